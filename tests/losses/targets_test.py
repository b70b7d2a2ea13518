"""Locations and assignment against literal loops."""

import jax
import numpy as np
import pytest

from alignps_jax.boxes import locations
from alignps_jax.losses import targets
from alignps_jax.types import Targets

FULL = (0.0, np.inf)
NONE = (1.0, 0.0)


assign_jit = jax.jit(targets.assign_targets, static_argnames="center_radius")


def level(height: int, width: int, stride: int, extent: tuple[float, float] = FULL):
    """Locations, strides and ranges of one level."""
    points = np.asarray(locations(height, width, stride))
    count = height * width
    ranges = np.tile(np.array(extent, np.float32), (count, 1))
    return points, np.full(count, stride, np.float32), ranges


def assign(points, strides, ranges, boxes, *, valid=None, **people) -> Targets:
    """`assign_targets` with every box a labeled person of its own unless told otherwise."""
    boxes = np.asarray(boxes, np.float32)
    result = assign_jit(
        points,
        strides,
        ranges,
        np.ones(len(points), bool) if valid is None else valid,
        boxes,
        people.get("identity", np.arange(len(boxes)) + 10),
        people.get("labeled", np.ones(len(boxes), bool)),
        people.get("box_valid", np.ones(len(boxes), bool)),
        center_radius=1.5,
    )
    return jax.device_get(result)


def slow_assignment(points, strides, ranges, valid, boxes, box_valid, radius):
    """The box of each location, or -1."""
    chosen = np.full(len(points), -1)
    for i, (x, y) in enumerate(points):
        best_area = np.inf
        for g, (x1, y1, x2, y2) in enumerate(boxes):
            reach = radius * strides[i]
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            inside = max(x1, cx - reach) < x < min(x2, cx + reach)
            inside &= max(y1, cy - reach) < y < min(y2, cy + reach)
            extent = max(x - x1, y - y1, x2 - x, y2 - y)
            inside &= ranges[i][0] <= extent <= ranges[i][1]
            size = (x2 - x1) * (y2 - y1)
            if valid[i] and box_valid[g] and inside and size < best_area:
                chosen[i], best_area = g, size
    return chosen


def test_locations_are_cell_centers_row_by_row():
    expected = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert locations(2, 3, 8).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_assignment_matches_loop_on_two_levels(seed: int):
    rng = np.random.default_rng(seed)
    parts = [level(9, 14, 8, (0, 30)), level(5, 7, 16, (30, np.inf)), level(3, 4, 32, NONE)]
    points, strides, ranges = (np.concatenate(p) for p in zip(*parts, strict=True))
    corner = rng.uniform([0, 0], [80, 40], (12, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 70, (12, 2))], 1).astype(np.float32)
    valid, box_valid = rng.random(len(points)) < 0.9, rng.random(12) < 0.8
    identity, labeled = rng.integers(0, 90, 12), rng.random(12) < 0.5
    people = {"identity": identity, "labeled": labeled, "box_valid": box_valid}
    result = assign(points, strides, ranges, boxes, valid=valid, **people)
    chosen = slow_assignment(points, strides, ranges, valid, boxes, box_valid, 1.5)
    assert (chosen[: 9 * 14] >= 0).any()
    assert (chosen[9 * 14 :] >= 0).any()
    assert not result.positive[-12:].any()
    np.testing.assert_array_equal(result.positive, chosen >= 0)
    for i, g in enumerate(chosen):
        if g < 0:
            assert not np.any(result.distances[i])
            assert (result.centerness[i], result.identity[i], result.labeled[i]) == (0, 0, False)
            continue
        (x, y), (x1, y1, x2, y2) = points[i], boxes[g]
        left, top, right, bottom = (v / strides[i] for v in (x - x1, y - y1, x2 - x, y2 - y))
        np.testing.assert_allclose(result.distances[i], [left, top, right, bottom], rtol=1e-5)
        ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        np.testing.assert_allclose(result.centerness[i], np.sqrt(ratio), rtol=1e-5)
        assert (result.identity[i], result.labeled[i]) == (identity[g], labeled[g])


def test_center_sampling_boundary_is_open():
    points, strides, ranges = level(9, 9, 8)
    # Center (36, 36), on a location: 12 px in both directions excludes x = 24, 48.
    result = assign(points, strides, ranges, [[0, 0, 72, 72]])
    assert points[result.positive].tolist() == [
        [x, y] for y in (28.0, 36.0, 44.0) for x in (28.0, 36.0, 44.0)
    ]
    # Center (32, 32), between locations: x = 20 and x = 44 lie exactly on the boundary.
    result = assign(points, strides, ranges, [[0, 0, 64, 64]])
    assert points[result.positive].tolist() == [[28, 28], [36, 28], [28, 36], [36, 36]]


def test_box_side_is_open_and_small_boxes_may_have_no_location():
    points, strides, ranges = level(4, 4, 8)
    assert assign(points, strides, ranges, [[4, 5, 12, 19]]).positive.sum() == 0
    assert assign(points, strides, ranges, [[3, 5, 13, 19]]).positive.sum() == 2
    assert assign(points, strides, ranges, [[5, 5, 11, 11]]).positive.sum() == 0


def test_smallest_area_wins_and_ties_go_to_the_first():
    points, strides, ranges = level(4, 4, 8)
    boxes = [[0, 0, 32, 32], [8, 4, 24, 28], [4, 8, 28, 24]]  # the last two have equal area
    result = assign(points, strides, ranges, boxes, identity=np.array([7, 8, 9]))
    middle = int(np.flatnonzero((points == [12, 12]).all(1))[0])
    assert result.identity[middle] == 8
    result = assign(points, strides, ranges, boxes[::-1], identity=np.array([9, 8, 7]))
    assert result.identity[middle] == 9


def test_range_ends_are_included():
    point, stride = np.array([[12.0, 12.0]], np.float32), np.array([8.0], np.float32)
    for extent, expected in [((0, 20), True), ((20, 30), True), ((0, 19.9), False), (NONE, False)]:
        ranges = np.array([extent], np.float32)
        result = assign(point, stride, ranges, [[8, 4, 16, 32]])
        assert bool(result.positive[0]) is expected


@pytest.mark.parametrize("why", ["no valid box", "no valid location", "empty boxes"])
def test_nothing_to_assign(why: str):
    points, strides, ranges = level(3, 4, 8)
    boxes = np.zeros((2, 4)) if why == "empty boxes" else np.array([[0, 0, 32, 24.0]] * 2)
    valid, box_valid = np.full(12, why != "no valid location"), np.full(2, why != "no valid box")
    result = assign(points, strides, ranges, boxes, valid=valid, box_valid=box_valid)
    for leaf in jax.tree.leaves(result):
        assert np.isfinite(leaf).all()
        assert not np.any(leaf)
