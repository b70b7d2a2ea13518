"""Detection against literal loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.inference.postprocess import detect, embed_boxes
from alignps_jax.types import Detections, Outputs
from tests.boxes_test import slow_nms

# One compilation per shape instead of one per operation.
jit_detect = jax.jit(detect, static_argnames=("strides", "pre_nms", "max_detections"))
SETTINGS = {"pre_nms": 1000, "min_cls_score": 0.05, "nms_iou": 0.5, "max_detections": 100}


def random_outputs(rng: np.random.Generator, batch: int, height: int, width: int) -> Outputs:
    shape = (batch, height, width)
    return Outputs(
        cls_logits=rng.normal(-1, 2, shape).astype(np.float32),
        box_distances=rng.uniform(0, 3, (*shape, 4)).astype(np.float32),
        centerness_logits=rng.normal(0, 2, shape).astype(np.float32),
        embeddings=rng.normal(0, 5, (*shape, 6)).astype(np.float32),
        valid=rng.random(shape) < 0.9,
    )


def slow_detect(levels, strides, size, scale, pre_nms, min_cls_score, nms_iou, max_detections):
    """Boxes, scores and embeddings of one image, best first."""
    found = []
    for level, stride in zip(levels, strides, strict=True):
        height, width = level.cls_logits.shape
        of_level = []
        for y, x in np.ndindex(height, width):
            if not level.valid[y, x]:
                continue
            cls = 1 / (1 + np.exp(-np.float64(level.cls_logits[y, x])))
            score = cls / (1 + np.exp(-np.float64(level.centerness_logits[y, x])))
            left, top, right, bottom = np.asarray(level.box_distances[y, x], np.float64) * stride
            cx, cy = x * stride + stride / 2, y * stride + stride / 2
            xs = np.clip([cx - left, cx + right], 0, size[1]) / scale[0]
            ys = np.clip([cy - top, cy + bottom], 0, size[0]) / scale[1]
            f = np.asarray(level.embeddings[y, x], np.float64)
            box = np.array([xs[0], ys[0], xs[1], ys[1]])
            of_level.append((score, cls, box, f / np.linalg.norm(f)))
        found += sorted(of_level, key=lambda c: -c[0])[:pre_nms]
    found = sorted((c for c in found if c[1] > min_cls_score), key=lambda c: -c[0])
    keep = slow_nms(np.array([c[2] for c in found]), np.ones(len(found), bool), nms_iou)
    kept = [c for c, k in zip(found, keep, strict=True) if k][:max_detections]
    return [np.array([c[i] for c in kept]) for i in (2, 0, 3)]


@pytest.mark.parametrize(
    ("strides", "changes"),
    [
        ((8,), {}),
        ((8,), {"min_cls_score": 0.6, "nms_iou": 0.2}),
        ((8,), {"pre_nms": 30, "max_detections": 7}),
        ((8, 16), {"pre_nms": 20}),
        ((8, 16), {"max_detections": 400}),
    ],
)
def test_detect_matches_loop(strides: tuple[int, ...], changes: dict[str, float]):
    rng = np.random.default_rng(len(strides))
    outputs = [random_outputs(rng, 2, 72 // s, 96 // s) for s in strides]
    size, scale = jnp.array([[70, 91], [72, 60]]), jnp.array([[0.5, 0.8], [1.7, 1.6]])
    settings = SETTINGS | changes
    result = jax.device_get(jit_detect(outputs, size, scale, strides=strides, **settings))
    assert result.boxes.shape == (2, settings["max_detections"], 4)
    for i in range(2):
        levels = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), level) for level in outputs]
        boxes, scores, embeddings = slow_detect(
            levels, strides, np.asarray(size[i]), np.asarray(scale[i], np.float64), **settings
        )
        count = len(scores)
        assert result.valid[i].tolist() == [k < count for k in range(settings["max_detections"])]
        np.testing.assert_allclose(result.boxes[i, :count], boxes, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(result.scores[i, :count], scores, rtol=1e-5)
        np.testing.assert_allclose(result.embeddings[i, :count], embeddings, atol=1e-6)
        for leaf in (result.boxes, result.scores, result.embeddings):
            assert not np.any(leaf[i, count:])


def logit(p: float) -> np.float32:
    return np.float32(np.log(p / (1 - p)))


def one_location(cls: float, centerness: float) -> Outputs:
    """One confident location in a map of none, with a 16 x 16 box."""
    spot = np.zeros((1, 4, 5), bool)
    spot[0, 1, 2] = True
    return random_outputs(np.random.default_rng(0), 1, 4, 5).replace(
        cls_logits=np.where(spot, logit(cls), np.float32(-20)),
        centerness_logits=np.full(spot.shape, logit(centerness)),
        box_distances=np.ones((1, 4, 5, 4), np.float32),
        valid=np.ones((1, 4, 5), bool),
    )


def run(outputs: Outputs) -> Detections:
    size, scale = jnp.array([[32, 40]]), jnp.array([[2.0, 0.5]])
    return jax.device_get(jit_detect([outputs], size, scale, strides=(8,), **SETTINGS))


def test_score_threshold_applies_before_centerness():
    result = run(one_location(cls=0.06, centerness=0.1))
    assert result.valid.sum() == 1
    np.testing.assert_allclose(result.scores[0, 0], 0.006, rtol=1e-5)
    # Location (20, 12): box 12..28 x 4..20, divided by 2 and by 0.5.
    np.testing.assert_allclose(result.boxes[0, 0], [6, 8, 14, 40], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result.embeddings[0, 0]), 1, rtol=1e-6)
    assert run(one_location(cls=0.04, centerness=0.9)).valid.sum() == 0


def test_nothing_valid_and_extreme_logits():
    outputs = one_location(cls=0.9, centerness=0.9)
    invalid = outputs.replace(valid=np.zeros((1, 4, 5), bool))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(invalid)))
    extreme = outputs.replace(
        cls_logits=np.sign(outputs.cls_logits) * np.float32(1e4),
        centerness_logits=np.full((1, 4, 5), 1e4, np.float32),
        embeddings=np.zeros((1, 4, 5, 6), np.float32),
    )
    result = run(extreme)
    assert result.scores[0, 0] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("borders", [(), (40.0,), (20.0, 60.0)])
def test_embed_boxes_takes_the_nearest_valid_location_of_the_right_level(borders):
    rng = np.random.default_rng(7)
    strides = (8, 16, 32)[: len(borders) + 1]
    batch, width, height = 3, 256, 192
    # Bucket padding to the right and below: those locations do not count.
    extent = np.array([[192, 256], [160, 96], [64, 224]])
    levels = []
    for stride in strides:
        level = random_outputs(rng, batch, height // stride, width // stride)
        rows, columns = np.ogrid[: height // stride, : width // stride]
        inside = [(rows * stride < h) & (columns * stride < w) for h, w in extent]
        levels.append(level.replace(valid=np.stack(inside)))
    corner = rng.uniform(0, 0.7, (batch, 9, 2)) * extent[:, None, ::-1]
    size = rng.uniform(2, 150, (batch, 9, 2))
    boxes = np.concatenate([corner, np.minimum(corner + size, extent[:, None, ::-1])], -1)
    # The largest person of all, exactly on a border, and at the very edge of the image.
    boxes[0, 0] = (0, 0, 255, 191)
    boxes[0, 1] = (10, 10, 30, 10 + 2 * (borders[0] if borders else 40))
    boxes[0, 2] = (256, 192, 256, 192)
    boxes = boxes.astype(np.float32)
    valid = rng.random((batch, 9)) < 0.8
    valid[0, :3] = True
    scale = rng.uniform(0.4, 2.5, (batch, 2)).astype(np.float32)

    found = jax.jit(embed_boxes, static_argnames=("strides", "borders"))(
        levels, boxes, valid, scale, strides=strides, borders=borders
    )
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(found.scores, valid)
    for image, row in np.ndindex(batch, 9):
        if not valid[image, row]:
            assert not np.asarray(found.boxes)[image, row].any()
            assert not np.asarray(found.embeddings)[image, row].any()
            continue
        x1, y1, x2, y2 = boxes[image, row]
        level = sum(border < max(x2 - x1, y2 - y1) / 2 for border in borders)
        outputs, stride = levels[level], strides[level]
        distances = np.full(outputs.valid.shape[1:], np.inf)
        for i, j in np.argwhere(outputs.valid[image]):
            x, y = (j + 0.5) * stride, (i + 0.5) * stride
            distances[i, j] = np.hypot(x - (x1 + x2) / 2, y - (y1 + y2) / 2)
        nearest = outputs.embeddings[image][np.unravel_index(distances.argmin(), distances.shape)]
        np.testing.assert_allclose(
            found.embeddings[image, row], nearest / np.linalg.norm(nearest), atol=1e-6
        )
        in_photo = [x1, y1, x2, y2] / np.tile(scale[image], 2)
        np.testing.assert_allclose(found.boxes[image, row], in_photo, rtol=1e-6)
