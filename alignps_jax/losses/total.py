"""The paper's loss: targets, positives and terms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alignps_jax.arrays import first_true
from alignps_jax.nn.model import AlignPS
from alignps_jax.types import Outputs, Positives, Targets, UserError

# The range of a level that learns background only: no box is within it.
NO_RANGE = (np.inf, 0.0)


TRIPLETS = {"none": (False, False), "batch": (True, False), "batch_and_lut": (True, True)}


def level_ranges(model: AlignPS, borders: Sequence[float]) -> list[tuple[float, float]]:
    """Smallest and largest extent of what each level predicts in training (FCOS), in pixels.

    A location's extent is its largest distance to a side of its box.

    Args:
      model: whose levels they are.
      borders: `config.loss.level_borders`, between each level that is searched on and the next.

    Raises:
      UserError: there are too few or too many borders, or they do not ascend.
    """
    levels = model.predicted_levels(train=False)
    edges = (0.0, *borders, np.inf)
    numbers = all(isinstance(border, int | float) for border in borders)
    ascending = numbers and all(low < high for low, high in pairwise(edges))
    if not ascending or len(borders) != len(levels) - 1:
        raise UserError(
            f"config.loss.level_borders: found {tuple(borders)}, expected {len(levels) - 1} "
            f"ascending numbers of pixels for config.model.levels = {levels}"
        )
    background = len(model.predicted_levels(train=True)) - len(levels)
    return [*pairwise(edges), *[NO_RANGE] * background]


def flatten_levels(outputs: tuple[Outputs, ...]) -> Outputs:
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
        mask=chosen.mask,
        distances=take(flat.box_distances),
        centerness_logits=take(flat.centerness_logits),
        embeddings=take(flat.embeddings),
        target_distances=take(targets.distances),
        target_centerness=take(targets.centerness),
        identity=take(targets.identity),
        labelled=take(targets.labelled),
    )
    return positives, chosen.dropped
