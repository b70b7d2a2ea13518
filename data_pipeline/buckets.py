"""Shapes to pad to that are chosen from the photos: few programs, little padding.

In the order of their aspect ratios, photos at one scale get wider and less high. The photos of a
shape are therefore a stretch of that order, and dynamic programming finds the best stretches: first
of photos that fill batches of their own, then of these groups for the shapes of each scale.
"""

import itertools

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.types import UserError
from data_pipeline.transforms import MULTIPLE, Size

# A division of cells into stretches: the pixels of all, and the cells where one begins.
_Division = tuple[float, list[int]]


def choose_buckets(
    sizes: Int[np.ndarray, "N S 2"], indices: Int[np.ndarray, "n"], most: int, batch_size: int
) -> tuple[tuple[Int[np.ndarray, "_"], ...], tuple[Size, ...]]:
    """Groups of photos that come into batches together, and at most `most` shapes for all groups.

    There are at most twice as many groups as shapes for each scale, and each fills a batch, unless
    there are too few photos for one. Padding is the least possible where all scales are as likely.

    Args:
      sizes: (height, width) of all photos of a split at each of the S training scales.
      indices: the photos to train on; groups are parts of these.
      most: `config.data.max_programs`.

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
    _, firsts = _divisions(rounded[starts], counts, 2 * most // scales, batch_size)[-1]
    groups = np.maximum.reduceat(rounded[starts], firsts)
    counts = np.add.reduceat(counts, firsts)
    by_scale = [_divisions(groups[:, [s]], counts, len(groups), 1) for s in range(scales)]
    shapes: set[Size] = set()
    for scale, stretches in enumerate(_fewest_pixels(by_scale, most)):
        found = np.maximum.reduceat(groups[:, scale], stretches)
        shapes |= {(int(height), int(width)) for height, width in found}
    parts = np.split(order, starts[firsts[1:]])
    return tuple(np.sort(part) for part in parts), tuple(sorted(shapes))


def _divisions(
    cells: Int[np.ndarray, "C S 2"], counts: Int[np.ndarray, "C"], most: int, at_least: int
) -> list[_Division]:
    """The best division into 1, 2, ... `most` stretches of at least `at_least` photos each.

    The list ends where there is no division into so many.
    """
    cost = _pixels(cells, counts, at_least)
    best, last = cost[0], np.zeros((0, len(cells)), int)
    found: list[_Division] = [(float(best[-1]), [0])]
    while len(found) < min(most, len(cells)):
        # The first cell of the last stretch, for every end of it.
        total = np.full(cost.shape, np.inf)
        total[1:] = best[:-1, None] + cost[1:]
        last = np.vstack([last, total.argmin(axis=0)])
        best = total.min(axis=0)
        if not np.isfinite(best[-1]):
            break
        starts = [len(cells)]
        for row in last[::-1]:
            starts.append(int(row[starts[-1] - 1]))
        found.append((float(best[-1]), [0, *starts[:0:-1]]))
    return found


def _pixels(
    cells: Int[np.ndarray, "C S 2"], counts: Int[np.ndarray, "C"], at_least: int
) -> Float[np.ndarray, "C C"]:
    """Pixels of cells i to j, padded to a shape for each scale; infinite for too few photos."""
    at_least = min(at_least, counts.sum())  # all together may be too few for a batch
    cost = np.full((len(cells), len(cells)), np.inf)
    for first in range(len(cells)):
        boxes = np.maximum.accumulate(cells[first:], axis=0)
        photos = np.cumsum(counts[first:])
        areas = boxes.prod(axis=-1).sum(axis=-1) * photos
        cost[first, first:] = np.where(photos >= at_least, areas, np.inf)
    return cost


def _fewest_pixels(by_scale: list[list[_Division]], most: int) -> list[list[int]]:
    """Which of its divisions each scale takes, so that there are at most `most` stretches."""
    best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
    for divisions in by_scale:
        after: dict[int, tuple[float, list[list[int]]]] = {}
        for (used, (total, chosen)), (pixels, starts) in itertools.product(best.items(), divisions):
            count = used + len(starts)
            if count <= most and total + pixels < after.get(count, (np.inf, []))[0]:
                after[count] = (total + pixels, [*chosen, starts])
        best = after
    return min(best.values())[1]
