"""Which photos and boxes a network can be trained on, and the sizes that they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Int

from alignps_jax.types import UserError
from data_pipeline import transforms
from data_pipeline.transforms import Scale

if TYPE_CHECKING:
    from data_pipeline.datasets import PreparedSplit


def with_trainable_boxes(split: PreparedSplit) -> PreparedSplit:
    """The split without the boxes that cannot be trained on."""
    people = split.annotations
    sizes = split.sizes.tolist()
    keep = [transforms.trainable_boxes(*pair) for pair in zip(people.boxes, sizes, strict=True)]

    def kept(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(array[mask] for array, mask in zip(arrays, keep, strict=True))

    annotations = dataclasses.replace(
        people,
        boxes=kept(people.boxes),
        identity=kept(people.identity),
        labeled=kept(people.labeled),
    )
    return dataclasses.replace(split, annotations=annotations)


def usable_images(split: PreparedSplit, min_side: int) -> Int[np.ndarray, "n"]:
    """Images with people and with no side below `min_side`; prints how many are left out."""
    empty = np.array([len(boxes) == 0 for boxes in split.annotations.boxes], bool)
    small = (split.sizes < min_side).any(axis=1)
    usable = np.flatnonzero(~empty & ~small)
    found = (
        f"{len(empty) - len(usable)} of {len(empty)} images left out of training "
        f"({int(empty.sum())} without a usable box, {int((small & ~empty).sum())} with a side "
        f"below {min_side} pixels)"
    )
    if not len(usable):
        raise UserError(f"training set: {found}; expected at least one to train on")
    if len(usable) < len(empty) and jax.process_index() == 0:
        print(found)
    return usable


def orientations(
    split: PreparedSplit, indices: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "l"], Int[np.ndarray, "p"]]:
    """Splits images into landscape and portrait, in the given order."""
    landscape = np.array([transforms.is_landscape(split.sizes[i]) for i in indices], bool)
    return indices[landscape], indices[~landscape]


def rescaled_sizes(split: PreparedSplit, scales: Sequence[Scale]) -> Int[np.ndarray, "N S 2"]:
    sizes = [[transforms.rescaled_size(size, s) for s in scales] for size in split.sizes.tolist()]
    return np.array(sizes, np.int32).reshape(-1, len(scales), 2)
