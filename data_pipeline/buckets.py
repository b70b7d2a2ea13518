"""Shapes to pad to that are chosen from the photos: few programs, little padding.

At one scale, photos of one aspect ratio have one size, so the photos in the order of their aspect
ratios lie on a curve: along it they get wider and less high. The photos of a shape are therefore a
stretch of that order, and dynamic programming finds the best stretches exactly. It is done twice:
for groups of photos, each of which fills batches of its own, and for the shapes that these groups
share at each scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.types import UserError
from data_pipeline.transforms import MULTIPLE, Size


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Groups of photos that come into batches together, and what these are padded to.

    `groups` are positions in the split, `shapes` the (height, width) of all groups at all scales,
    `padding` the expected share of pixels that are padding, where each scale is as likely.
    """

    groups: tuple[Int[np.ndarray, "_"], ...]
    shapes: tuple[Size, ...]
    padding: float


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The best division of C cells into stretches: cells where one begins, and pixels in all."""

    starts: tuple[int, ...]
    pixels: float


def choose_buckets(
    sizes: Int[np.ndarray, "N S 2"],
    indices: Int[np.ndarray, "n"],
    most: int,
    batch_size: int,
) -> Buckets:
    """Chooses at most `most` shapes for the photos `indices`.

    There are at most twice as many groups as there are shapes for each scale, and each fills a
    batch, unless there are too few photos for one.

    Args:
      sizes: (height, width) of all photos of a split at each of the S training scales.
      indices: the photos to train on.
      most: `config.data.max_programs`.
      batch_size: photos of a batch.

    Raises:
      UserError: `most` is less than the number of scales.
    """
    scales = sizes.shape[1]
    if most < scales:
        raise UserError(
            f"config.data.max_programs: found {most}, expected at least one for each of the "
            f"{scales} config.data.train_scales, or none"
        )
    largest = sizes[indices, -1].astype(np.int64)
    order = indices[np.argsort(largest[:, 1] / largest[:, 0], kind="stable")]
    rounded = -(-sizes[order].astype(np.int64) // MULTIPLE) * MULTIPLE
    # Photos beside one another that need the same shapes are one cell.
    starts = np.flatnonzero(np.r_[True, (rounded[1:] != rounded[:-1]).any(axis=(1, 2))])
    counts = np.diff(np.r_[starts, len(order)])
    cells = rounded[starts]
    grouped = _divisions(cells, counts, 2 * most // scales, batch_size)[-1]
    firsts = list(grouped.starts)
    boxes = np.maximum.reduceat(cells, firsts)
    counts = np.add.reduceat(counts, firsts)
    by_scale = [_divisions(boxes[:, [s]], counts, len(boxes), 1) for s in range(scales)]
    chosen = _share_out([[cut.pixels for cut in cuts] for cuts in by_scale], most)
    shapes = set()
    for scale, (cuts, index) in enumerate(zip(by_scale, chosen, strict=True)):
        found = np.maximum.reduceat(boxes[:, scale], list(cuts[index].starts))
        shapes |= {(int(height), int(width)) for height, width in found}
    pixels = sum(cuts[index].pixels for cuts, index in zip(by_scale, chosen, strict=True))
    return Buckets(
        groups=tuple(np.sort(part) for part in np.split(order, starts[firsts[1:]])),
        shapes=tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))),
        padding=float(1 - sizes[order].astype(np.int64).prod(axis=-1).sum() / pixels),
    )


def _divisions(
    cells: Int[np.ndarray, "C S 2"], counts: Int[np.ndarray, "C"], most: int, at_least: int
) -> list[_Cut]:
    """The best division into 1, 2, ... `most` stretches of at least `at_least` photos each.

    The list ends where there is no division into so many.
    """
    cost = _pixels(cells, counts, at_least)
    whole = cost[0, -1]
    if not np.isfinite(whole):  # too few photos for a batch
        return [_Cut((0,), _pixels(cells, counts, 0)[0, -1])]
    best = [cost[0]]
    last: list[Int[np.ndarray, "C"]] = []
    while len(best) < min(most, len(cells)):
        # The first cell of the last stretch, for every end of it.
        total = np.full(cost.shape, np.inf)
        total[1:] = best[-1][:-1, None] + cost[1:]
        start = total.argmin(axis=0)
        found = total[start, np.arange(len(cells))]
        if not np.isfinite(found[-1]):
            break
        best.append(found)
        last.append(start)
    return [_Cut(_starts(last[:count]), float(row[-1])) for count, row in enumerate(best)]


def _starts(last: Sequence[Int[np.ndarray, "C"]]) -> tuple[int, ...]:
    """Where the stretches begin, from the last one back."""
    starts: list[int] = []
    end = -1
    for row in reversed(last):
        starts.append(int(row[end]))
        end = starts[-1] - 1
    return (0, *reversed(starts))


def _pixels(
    cells: Int[np.ndarray, "C S 2"], counts: Int[np.ndarray, "C"], at_least: int
) -> Float[np.ndarray, "C C"]:
    """Pixels of the cells i to j, padded to one shape for each scale; infinite where too few."""
    cost = np.full((len(cells), len(cells)), np.inf)
    for first in range(len(cells)):
        boxes = np.maximum.accumulate(cells[first:], axis=0)
        photos = np.cumsum(counts[first:])
        areas = boxes.prod(axis=-1).sum(axis=-1) * photos
        cost[first, first:] = np.where(photos >= at_least, areas, np.inf)
    return cost


def _share_out(pixels: Sequence[Sequence[float]], most: int) -> list[int]:
    """Which of its divisions each scale takes, so that there are at most `most` stretches.

    The division `index` has `index + 1` stretches.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for costs in pixels:
        after: dict[int, tuple[float, list[int]]] = {}
        for used, (total, choice) in best.items():
            for index, cost in enumerate(costs):
                count = used + index + 1
                if count <= most and total + cost < after.get(count, (np.inf, []))[0]:
                    after[count] = (total + cost, [*choice, index])
        best = after
    return min(best.values())[1]
