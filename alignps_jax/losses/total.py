"""The paper's loss on one page: targets of all locations, the positive ones, and every term.

Pure: nothing here knows the network or other devices. Who runs on several devices adds up the
`Term`s of all of them before dividing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from alignps_jax.arrays import first_true
from alignps_jax.boxes import locations
from alignps_jax.losses.oim import oim_loss
from alignps_jax.losses.targets import assign_targets
from alignps_jax.losses.terms import (
    People,
    Term,
    centerness_loss,
    focal_loss,
    giou_loss,
    triplet_loss,
)
from alignps_jax.registry import choose
from alignps_jax.types import Batch, OIMMemory, Outputs, Positives, Targets, UserError

# The range of a level that learns background only: no box is within it.
NO_RANGE = (np.inf, 0.0)
# config.loss.triplet: whether there is the term, and whether the table's rows take part in it.
TRIPLETS = {"none": (False, False), "batch": (True, False), "batch_and_lut": (True, True)}


def total(
    outputs: Outputs,
    targets: Targets,
    mine: Positives,
    everyone: Positives,
    memory: OIMMemory,
    rules: ConfigDict,
    *,
    first: int | Int[Array, ""] = 0,
) -> dict[str, Term]:
    """This device's part of every loss; all have weight 1 (Released code).

        L = cls + box + centerness + oim + triplet, each sum / count over all devices

    Args:
      outputs: predictions at all locations, `[B, N, ...]`; see `flatten_levels`.
      targets: of the same locations.
      mine: this device's positives.
      everyone: those of all devices, in device order; `mine` itself on one device.
      memory: table and queue before this step's update.
      rules: `config.loss`.
      first: where `mine` begins in `everyone`.
    """
    # Detection (FCOS). Every location is classified; only positive ones have a box to learn.
    classified = focal_loss(
        outputs.cls_logits,
        targets.positive,
        outputs.valid,
        alpha=rules.focal_alpha,
        gamma=rules.focal_gamma,
    )
    weight, valid = mine.target_centerness, mine.valid
    terms = {
        "cls": Term(sum=classified, count=targets.positive.sum() + len(outputs.valid)),
        "box": giou_loss(mine.distances, mine.target_distances, weight, valid),
        "centerness": centerness_loss(mine.centerness_logits, weight, valid),
        # Re-id (TOIM, Paper, Sec. 3.3): every person against the whole memory ...
        "oim": oim_loss(
            mine.embeddings,
            mine.identity,
            mine.labeled,
            valid,
            memory,
            inverse_lut_temperature=rules.inverse_lut_temperature,
            inverse_queue_temperature=rules.inverse_queue_temperature,
            focal_gamma=rules.oim_focal_gamma,
        ),
    }
    # ... and against the hardest people of this step, on whichever device they are.
    use_triplet, use_lut = TRIPLETS[rules.triplet]
    if use_triplet:
        terms["triplet"] = triplet_loss(
            _labeled(mine),
            _labeled(everyone),
            memory.lut if use_lut else None,
            first=first,
            margin=rules.triplet_margin,
            first_lut_identity=rules.triplet_first_lut_identity,
        )
    return terms


def _labeled(positives: Positives) -> People:
    valid = positives.valid & positives.labeled
    return People(positives.embeddings, positives.identity, valid)


def check_triplet(rules: ConfigDict) -> None:
    """Raises UserError unless `config.loss.triplet` is an entry of `TRIPLETS`."""
    choose("config.loss.triplet", rules.triplet, TRIPLETS)


def level_ranges(
    levels: Sequence[int], borders: Sequence[float], background: int = 0
) -> list[tuple[float, float]]:
    """Smallest and largest extent of what each level predicts in training (FCOS), in pixels.

    A location's extent is its largest distance to a side of its box.

    Args:
      levels: numbers of the levels that are searched on.
      borders: `config.loss.level_borders`, between each of them and the next.
      background: how many further levels learn background only.

    Raises:
      UserError: there are too few or too many borders, or they do not ascend.
    """
    edges = (0.0, *borders, np.inf)
    numbers = all(isinstance(border, int | float) for border in borders)
    ascending = numbers and all(low < high for low, high in pairwise(edges))
    if not ascending or len(borders) != len(levels) - 1:
        raise UserError(
            f"config.loss.level_borders: found {tuple(borders)}, expected {len(levels) - 1} "
            f"ascending numbers of pixels for config.model.levels = {tuple(levels)}"
        )
    return [*pairwise(edges), *[NO_RANGE] * background]


def assign(
    outputs: Sequence[Outputs],
    batch: Batch,
    *,
    strides: Sequence[int],
    ranges: Sequence[tuple[float, float]],
    center_radius: float,
) -> Targets:
    """Targets of all locations of all levels, `[B, N]`.

    Args:
      outputs: of every level; only their shapes and `valid` matter.
      batch: the annotations.
      strides: of every level.
      ranges: of every level; see `level_ranges`.
      center_radius: `config.loss.center_radius`, in strides.
    """
    maps = [level.cls_logits for level in outputs]
    sizes = [x.shape[1] * x.shape[2] for x in maps]
    points = [locations(x.shape[1], x.shape[2], s) for x, s in zip(maps, strides, strict=True)]
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
    """All levels as one row of locations per image: `[B, N, ...]`."""
    flat = [
        jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), level) for level in outputs
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *flat)


def select_positives(
    flat: Outputs, targets: Targets, limit: int
) -> tuple[Positives, Int[Array, ""]]:
    """The first `limit` positive locations, image by image, and how many there were beyond."""
    chosen = first_true(targets.positive.ravel(), limit)

    def take(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[chosen.index]

    positives = Positives(
        valid=chosen.valid,
        distances=take(flat.box_distances),
        centerness_logits=take(flat.centerness_logits),
        embeddings=take(flat.embeddings),
        target_distances=take(targets.distances),
        target_centerness=take(targets.centerness),
        identity=take(targets.identity),
        labeled=take(targets.labeled),
    )
    return positives, chosen.dropped
