"""Which photos go into which batch, and in which size: cheap, and without reading a photo.

A plan is a pure function of (split, configuration, seed, step): a resumed run sees the same
batches, and a process knows the shapes of its peers'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from alignps_jax.distributed import is_main_process
from alignps_jax.types import UserError
from data_pipeline import transforms
from data_pipeline.prepared import PreparedSplit, with_boxes
from data_pipeline.transforms import Scale, Size


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """What goes into one global batch of B rows, before any image is read.

    `indices` are positions in the split, `sizes` the (height, width) to resize each image to,
    `flips` which are mirrored, `bucket` the (height, width) that all are padded to. Rows that are
    not `valid` stay empty.
    """

    indices: Int[np.ndarray, "B"]
    sizes: Int[np.ndarray, "B 2"]
    flips: Bool[np.ndarray, "B"]
    valid: Bool[np.ndarray, "B"]
    bucket: Size

    def shard(self, process_index: int, process_count: int) -> BatchPlan:
        """The rows of one process: the global batch in equal, consecutive parts."""
        share = len(self.indices) // process_count
        rows = slice(process_index * share, (process_index + 1) * share)
        arrays = self.indices[rows], self.sizes[rows], self.flips[rows], self.valid[rows]
        return BatchPlan(*arrays, self.bucket)


def with_trainable_boxes(split: PreparedSplit) -> PreparedSplit:
    """The split without the boxes that cannot be trained on: with a side below a pixel."""
    boxes = np.concatenate(split.annotations.boxes)
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    return dataclasses.replace(split, annotations=with_boxes(split.annotations, boxes, keep))


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
    if len(usable) < len(empty) and is_main_process():
        print(found)
    return usable


def orientations(
    sizes: Int[np.ndarray, "N 2"], indices: Int[np.ndarray, "n"]
) -> list[Int[np.ndarray, "_"]]:
    """Images in landscape, and in portrait, in the given order; without an empty group."""
    landscape = np.array([transforms.is_landscape(sizes[i]) for i in indices], bool)
    return [group for group in (indices[landscape], indices[~landscape]) if len(group)]


def rescaled_sizes(
    sizes: Int[np.ndarray, "N 2"], scales: Sequence[Scale]
) -> Int[np.ndarray, "N S 2"]:
    """The (height, width) of all images at each of S scales."""
    rows = [[transforms.rescaled_size((h, w), x) for x in scales] for h, w in sizes.tolist()]
    return np.array(rows, np.int32).reshape(-1, len(scales), 2)
