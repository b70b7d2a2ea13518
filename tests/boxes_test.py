"""Boxes against closed forms and literal loops."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from alignps_jax import boxes as box_ops


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Well-formed boxes inside 60 x 40 pixels."""
    corner = rng.uniform([0, 0], [40, 25], (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 15, (count, 2))], 1).astype(np.float32)


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (total - shared) if total > shared else 0.0


@pytest.mark.parametrize(
    ("kind", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-5), (jnp.float32, 1e-5)]
)
def test_iou_of_all_pairs_matches_a_loop(kind, rtol):
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 9).astype(np.float64), random_boxes(rng, 6).astype(np.float64)
    expected = [[slow_iou(p, q) for q in b] for p in a]
    assert np.max(expected) > 0.1
    found = box_ops.iou(kind(a)[:, None], kind(b)[None])
    assert found.dtype == kind
    assert isinstance(found, type(kind(a)))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(box_ops.iou(kind(a[:6]), kind(b)), np.diag(expected), rtol=rtol)


def test_compiled_iou_rounds_as_numpy_does():
    """Anchors that contain a person tie, and only equal rounding keeps their ties."""
    rng = np.random.default_rng(3)
    corner = rng.uniform(-40, 300, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 200, (300, 2))], 1).astype(np.float32)
    found = jax.jit(lambda x: box_ops.iou(x[:, None], x[None]))(boxes)
    np.testing.assert_array_equal(found, box_ops.iou(boxes[:, None], boxes[None]))


@pytest.mark.parametrize("namespace", [np, jnp])
def test_iou_of_identical_touching_and_empty_boxes(namespace):
    a = namespace.array([[0, 0, 2, 4], [2, 0, 3, 4], [1, 1, 1, 1]], namespace.float32)
    np.testing.assert_array_equal(box_ops.iou(a[:, None], a[None]), np.diag([1.0, 1.0, 0.0]))
    assert box_ops.iou(a[:, None], a[:0][None]).shape == (3, 0)


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        ([0, 0, 4, 2], 1.0),  # the same
        ([2, 0, 6, 2], 4 / 12),  # overlap, nothing enclosed in vain
        ([4, 0, 8, 2], 0.0),  # touching
        ([8, 0, 12, 2], -8 / 24),  # apart: a third of the enclosing box is empty
        ([1, 1, 2, 4], 1 / 10 - 6 / 16),  # crossing
    ],
)
def test_giou_by_hand_anywhere_and_at_any_scale(b: list[float], expected: float):
    boxes = np.array([[0, 0, 4, 2], b], np.float32)
    for scale, shift in ((1, 0), (0.25, 8)):
        first, second = jnp.asarray(boxes * scale + shift)[:, None]
        np.testing.assert_allclose(box_ops.giou(first, second), [expected], atol=1e-5)


def test_giou_gradient_matches_finite_differences():
    rng = np.random.default_rng(2)
    a, b = random_boxes(rng, 8), random_boxes(rng, 8)
    gradient = jax.grad(lambda x: box_ops.giou(x, jnp.asarray(b)).sum())(jnp.asarray(a))
    for column, shift in enumerate(np.eye(4, dtype=np.float32) * 1e-2):
        slope = (box_ops.giou(a + shift, b) - box_ops.giou(a - shift, b)) / 2e-2
        np.testing.assert_allclose(gradient[:, column], slope, atol=2e-3)


def test_giou_of_empty_boxes_is_finite_with_finite_gradient():
    empty = jnp.array([[0, 0, 0, 0], [0, 0, 0, 5], [3, 3, 3, 3], [0, 0, 0, 0]], jnp.float32)
    other = jnp.array([[0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 1, 1], [0, 0, 1, 1]], jnp.float32)
    found = jax.value_and_grad(lambda a, b: box_ops.giou(a, b).sum(), (0, 1))(empty, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_distances_round_trip_and_order():
    boxes = box_ops.boxes_from_distances(jnp.array([[10.0, 20.0]]), jnp.array([[1.0, 2, 3, 5]]))
    assert boxes.tolist() == [[9, 18, 13, 25]]
    rng = np.random.default_rng(3)
    points, boxes = rng.uniform(0, 50, (7, 2)).astype(np.float32), random_boxes(rng, 7)
    distances = box_ops.distances_to_boxes(points, boxes)
    np.testing.assert_allclose(box_ops.boxes_from_distances(points, distances), boxes, atol=1e-5)


def test_clip_boxes_uses_height_for_y_and_width_for_x():
    boxes = jnp.array([[-5.0, -6.0, 300.0, 300.0], [5.0, 6.0, 7.0, 8.0], [210.0, 110.0, 220, 120]])
    clipped = box_ops.clip_boxes(boxes, jnp.array([100, 200]))
    assert clipped.tolist() == [[0, 0, 200, 100], [5, 6, 7, 8], [200, 100, 200, 100]]
    assert clipped.dtype == jnp.float32


def test_deltas_lead_back_to_boxes_and_sides_grow_by_a_bounded_factor():
    rng = np.random.default_rng(5)
    boxes, others = random_boxes(rng, 30), random_boxes(rng, 30)
    deltas = box_ops.deltas_to_boxes(boxes, others)
    np.testing.assert_allclose(box_ops.boxes_from_deltas(boxes, deltas), others, atol=1e-4)
    one = np.array([[10.0, 20, 14, 36], [10, 20, 14, 36]], np.float32)
    by_hand = np.array([[0.5, -0.25, np.log(3), -9], [0, 0, 0, 9]], np.float32)
    expected = [[8, 24 - 0.128, 20, 24 + 0.128], [10, 28 - 500, 14, 28 + 500]]
    found = box_ops.boxes_from_deltas(one, by_hand)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def slow_nms(boxes: np.ndarray, valid: np.ndarray, threshold: float) -> np.ndarray:
    keep = np.zeros(len(boxes), bool)
    for i in range(len(boxes)):
        keep[i] = valid[i] and not any(
            slow_iou(boxes[j], boxes[i]) > threshold for j in np.flatnonzero(keep[:i])
        )
    return keep


@pytest.mark.parametrize("limit", [12, 80])
def test_nms_matches_loop(limit: int):
    nms = jax.jit(partial(box_ops.nms, limit=limit))
    for seed, threshold in itertools.product(range(4), (0.1, 0.5)):
        rng = np.random.default_rng(seed)
        boxes, valid = random_boxes(rng, 80), rng.random(80) < 0.8
        expected = slow_nms(boxes, valid, threshold)
        assert 12 < expected.sum() < valid.sum()
        index, used = nms(boxes, valid, threshold)
        assert index[used].tolist() == np.flatnonzero(expected)[:limit].tolist()
        assert used.tolist() == sorted(used, reverse=True)


@pytest.mark.parametrize(
    ("boxes", "valid", "threshold", "kept"),
    [
        ([[0, 0, 2, 1], [0, 0, 1, 1]], [1, 1], 0.5, [1, 1]),  # an IoU of exactly 1/2
        ([[0, 0, 2, 1], [0, 0, 1, 1]], [1, 1], 0.49, [1, 0]),
        ([[3, 4, 9, 8]] * 5, [1, 1, 1, 1, 1], 0.5, [1, 0, 0, 0, 0]),
        ([[3, 4, 9, 8]] * 5, [0, 0, 1, 1, 0], 0.5, [0, 0, 1, 0, 0]),
        ([[3, 4, 9, 8]] * 5, [0, 0, 0, 0, 0], 0.5, [0, 0, 0, 0, 0]),
        ([[3, 4, 9, 8]], [1], 0.5, [1]),
        # Boxes without area never overlap, not even the same ones.
        (
            [[3, 4, 9, 8], [3, 4, 3, 8], [3, 4, 3, 8], [3, 4, 3, 4], [3, 4, 3, 4]],
            [1] * 5,
            0,
            [1] * 5,
        ),
        # Each overlaps only its neighbors, so that every answer waits for the one before.
        ([[x, 0, x + 2, 1] for x in range(41)], [1] * 41, 0.3, [1, 0] * 20 + [1]),
    ],
)
def test_nms_by_hand(boxes, valid, threshold: float, kept):
    boxes, valid = np.array(boxes, np.float32), np.array(valid, bool)
    index, used = jax.jit(partial(box_ops.nms, limit=41))(boxes, valid, threshold)
    assert index[used].tolist() == np.flatnonzero(kept).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_back_as_pillow_turns_photos(orientation):
    stored = np.zeros((7, 12), np.uint8)
    stored[1:4, 5:10] = 1
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    rows, columns = (np.flatnonzero(upright.any(axis=axis)) for axis in (1, 0))
    box = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], np.float32)
    found, size = box_ops.as_stored(box, upright.shape, orientation)
    np.testing.assert_array_equal(found, [[5, 1, 10, 4]])
    assert size == stored.shape
