"""The RoI branch's share of a training step (ROI-AlignPS)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from alignps_jax.losses.mutual_information import mutual_information
from alignps_jax.losses.roi import people_of, roi_terms, sample_rois
from alignps_jax.losses.rpn import propose, rpn_terms
from alignps_jax.losses.terms import Term
from alignps_jax.nn.layers import round_up
from alignps_jax.nn.neck import level_size
from alignps_jax.types import Batch, OIMMemory, People, RoiDraws


@struct.dataclass
class Regions:
    """What a step learns from regions, the people in those of all devices, and what changes."""

    terms: dict[str, Term]
    people: People
    frozen: Any  # with the running statistics after this step


def region_terms(
    apply: Callable[..., Any],
    c4: Float[Array, "B h w C"],
    batch: Batch,
    draws: RoiDraws,
    memory: OIMMemory,
    dense: People,
    config: ConfigDict,
    *,
    gather: Callable[[Any], Any],
    add_up: Callable[[Any], Any],
) -> Regions:
    """The terms of the proposals, of the regions, and of what both branches know of a person.

    Args:
      apply: the model's, with its variables.
      c4: the map that regions are read from.
      batch: this device's images.
      draws: the random choices.
      memory: table and queue of the RoI branch before this step's update.
      dense: the positive locations of all devices.
      config: `config.loss`.
      gather: arrays of this device to those of all, in order.
      add_up: arrays of this device to their sums over all.
    """
    size, width = level_size(round_up(jnp.asarray(batch.size)), 4), c4.shape[2]
    anchors = apply(c4, batch.size, method="propose")
    proposals = propose(anchors, batch.size, size, width)
    rois = sample_rois(*proposals, batch, draws.roi, config.rois_per_image)
    outputs, changed = apply(
        *(c4, batch.size, rois.boxes, rois.valid),
        train=True,
        add_up=add_up,
        method="embed",
        mutable=["frozen"],
    )
    terms = rpn_terms(anchors, batch, width, draws.rpn)
    terms |= roi_terms(outputs, rois, memory, config)
    people = gather(people_of(rois, outputs.embeddings))
    estimate = partial(apply, method="dependence")
    terms["mutual_information"] = mutual_information(people, dense, estimate, draws)
    return Regions(terms, people, changed["frozen"])
