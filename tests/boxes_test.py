"""Boxes against closed forms and literal loops."""

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
