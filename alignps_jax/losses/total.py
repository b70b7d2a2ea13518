"""The paper's loss on one page: targets of all locations, the positive ones, and every term.

Pure: nothing here knows the network or other devices. A caller on several devices adds up the
`Term`s of all of them before the division.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from alignps_jax.boxes import locations
from alignps_jax.losses.oim import oim_loss
from alignps_jax.losses.targets import assign_targets
from alignps_jax.losses.terms import Term, centerness_loss, focal_loss, giou_loss, triplet_loss
from alignps_jax.types import Batch, OIMMemory, Outputs, Positives, Targets

# config.loss.triplet: whether the loss has the term, and whether table rows are samples of it.
TRIPLETS = {"none": (False, False), "batch": (True, False), "batch_and_lut": (True, True)}


def total(
    outputs: Outputs,
    targets: Targets,
    local: Positives,
    gathered: Positives,
    memory: OIMMemory,
    config: ConfigDict,
    *,
    offset: int | Int[Array, ""] = 0,
) -> dict[str, Term]:
    """This device's part of every loss; all have weight 1 (Released code).

        L = cls + box + centerness + oim + triplet, each sum / count over all devices

    Args:
      outputs: predictions at all locations, `[B, N, ...]`; see `flatten_levels`.
      targets: of the same locations.
      local: this device's positives.
      gathered: those of all devices, in device order; `local` itself on one device.
      memory: table and queue before this step's update.
      config: `config.loss`.
      offset: index of the first of `local` in `gathered`.
    """
    # Detection (FCOS). Every location is classified; only positive ones learn a box.
    classification = focal_loss(
        outputs.cls_logits,
        targets.positive,
        outputs.valid,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
    )
    centerness, valid = local.target_centerness, local.valid
    terms = {
        "cls": Term(sum=classification, count=targets.positive.sum() + len(outputs.valid)),
        "box": giou_loss(local.distances, local.target_distances, centerness, valid),
        "centerness": centerness_loss(local.centerness_logits, centerness, valid),
        # Re-id (TOIM, Paper, Sec. 3.3): every person against the whole memory ...
        "oim": oim_loss(
            local,
            memory,
            inverse_lut_temperature=config.inverse_lut_temperature,
            inverse_queue_temperature=config.inverse_queue_temperature,
            focal_gamma=config.oim_focal_gamma,
            labeled_mean=config.oim_labeled_mean,
        ),
    }
    # ... and against the hardest people of this step, on all devices.
    use_triplet, use_lut = TRIPLETS[config.triplet]
    if use_triplet:
        terms["triplet"] = triplet_loss(
            local,
            gathered,
            memory.lut if use_lut else None,
            offset=offset,
            margin=config.triplet_margin,
            first_lut_identity=config.triplet_first_lut_identity,
        )
    return terms


def assign(
    outputs: Sequence[Outputs],
    batch: Batch,
    *,
    strides: Sequence[int],
    ranges: Sequence[tuple[float, float]],
    center_radius: float,
) -> Targets:
    """Targets `[B, N]` of all locations of all levels.

    `strides` and `ranges` are those of each level, as for `assign_targets`; `center_radius` is
    `config.loss.center_radius`, in strides.
    """
    maps = [level.cls_logits for level in outputs]
    points = [locations(x.shape[1], x.shape[2], s) for x, s in zip(maps, strides, strict=True)]
    sizes = [len(x) for x in points]
    of_image = partial(
        assign_targets,
        jnp.concatenate(points),
        jnp.asarray(np.repeat(strides, sizes), jnp.float32),
        jnp.asarray(np.repeat(ranges, sizes, axis=0), jnp.float32),
        center_radius=center_radius,
    )
    valid = flatten_levels(outputs).valid
    return jax.vmap(of_image)(valid, batch.boxes, batch.identity, batch.labeled, batch.valid)


def flatten_levels(outputs: Sequence[Outputs]) -> Outputs:
    """The locations of all levels as one axis: `[B, N, ...]`."""
    flat = [
        jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), level) for level in outputs
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *flat)


def select_positives(
    flat: Outputs, targets: Targets, limit: int
) -> tuple[Positives, Int[Array, ""]]:
    """The first `limit` positive locations, image by image, and the number of those beyond."""
    positive = targets.positive.ravel()
    index = jnp.flatnonzero(positive, size=limit, fill_value=0)
    count = jnp.sum(positive, dtype=jnp.int32)

    def take(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[index]

    positives = Positives(
        valid=jnp.arange(limit) < count,
        distances=take(flat.box_distances),
        centerness_logits=take(flat.centerness_logits),
        embeddings=take(flat.embeddings),
        target_distances=take(targets.distances),
        target_centerness=take(targets.centerness),
        identity=take(targets.identity),
        labeled=take(targets.labeled),
    )
    return positives, jnp.maximum(count - limit, 0)
