"""Anchors, assignment, sampling and proposals against literal loops in float32."""

from functools import partial

import jax
import numpy as np
import pytest

from alignps_jax.losses import rpn
from alignps_jax.losses.roi import draw
from alignps_jax.types import Batch, RegionOutputs
from tests.fakes import random_batch

# One compilation per shape instead of one per operation.
rpn_terms = jax.jit(rpn.rpn_terms, static_argnames="width")
propose = jax.jit(rpn.propose, static_argnames="width")
F = np.float32


def slow_anchors(height: int, width: int) -> np.ndarray:
    boxes = []
    for y, x, ratio, scale in np.ndindex(height, width, 3, 5):
        root, side = np.sqrt(F([0.5, 1, 2][ratio])), F(16 * 2 ** (scale + 1))
        half = np.array([side / root / F(2), side * root / F(2)])
        boxes.append([*(F([16 * x, 16 * y]) - half), *(F([16 * x, 16 * y]) + half)])
    return np.array(boxes, F)


def slow_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In float32: every operation rounds."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    w, h = np.maximum(high - low, F(0)).T
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + areas - w * h
    return w * h / np.maximum(union, F(1e-6))


def slow_deltas(box: np.ndarray, target: np.ndarray) -> list[float]:
    (w, h), (tw, th) = box[2:] - box[:2], target[2:] - target[:2]
    x, y = (target[:2] + target[2:]) / 2 - (box[:2] + box[2:]) / 2
    return [x / w, y / h, np.log(tw / w), np.log(th / h)]


def slow_assign(boxes: np.ndarray, size, people: np.ndarray) -> dict[int, int]:
    """Of anchors: the person of positive ones, -1 of negative ones."""
    found, table = {}, {}
    for a, (x, y, right, bottom) in enumerate(boxes):
        if x >= 0 and y >= 0 and right < size[1] and bottom < size[0]:
            table[a] = slow_iou(boxes[a], people)
            if max(table[a], default=0) < F(0.3):
                found[a] = -1
            elif max(table[a]) >= F(0.7):
                found[a] = int(np.argmax(table[a]))
    for person in range(len(people)):
        best = max((row[person] for row in table.values()), default=0)
        for a, row in table.items():
            if best >= F(0.3) and row[person] == best:
                found[a] = person
    return found


def slow_sample(positive, negative, draws, count: int) -> tuple[list[int], list[int]]:
    """The indices of sampled positive and negative candidates."""
    first = sorted(sorted(positive, key=lambda i: draws[i])[: count // 2])
    return first, sorted(sorted(negative, key=lambda i: draws[i])[: count - len(first)])


def outputs_of(rng: np.random.Generator, images: int, height: int, width: int) -> RegionOutputs:
    shape = (images, height * width * 15)
    logits, deltas = rng.normal(size=shape), rng.normal(0, 0.5, (*shape, 4))
    return RegionOutputs(logits=logits.astype(F), deltas=deltas.astype(F))


def batch_of(people: list[list[float]], height: int, width: int) -> Batch:
    batch = random_batch(np.random.default_rng(0), images=1, people=len(people))
    size, valid = np.array([[height, width]]), np.ones((1, len(people)), bool)
    return batch.replace(boxes=np.array([people], F), size=size, valid=valid)


def check_terms(batch: Batch, height: int, width: int) -> list[dict[int, int]]:
    """The people of the sampled anchors of each image, after all has been compared."""
    rng = np.random.default_rng(0)
    outputs, boxes = outputs_of(rng, len(batch.size), height, width), slow_anchors(height, width)
    draws = rng.random(outputs.logits.shape).astype(F)

    def sums(outputs):
        terms = rpn_terms(outputs, batch, width=width, draws=draws)
        return terms["rpn_cls"].sum + terms["rpn_box"].sum, terms

    gradient, terms = jax.grad(sums, has_aux=True)(outputs)
    cls = box = count = 0
    sampled = []
    for i, (logits, deltas) in enumerate(zip(outputs.logits, outputs.deltas, strict=True)):
        people = batch.boxes[i][batch.valid[i]]
        found = slow_assign(boxes, batch.size[i], people)
        kinds = ([a for a in found if (found[a] < 0) == negative] for negative in (False, True))
        positive, negative = slow_sample(*kinds, draws[i], 256)
        cls += np.log1p(np.exp(-logits[positive])).sum() + np.log1p(np.exp(logits[negative])).sum()
        for a in positive:
            box += np.abs(deltas[a] - slow_deltas(boxes[a], people[found[a]])).sum()
        count += max(len(positive), 1) + max(len(negative), 1)
        # The gradient tells which were sampled, and as what.
        assert np.flatnonzero(gradient.logits[i] < 0).tolist() == positive
        assert np.flatnonzero(gradient.logits[i] > 0).tolist() == negative
        assert np.flatnonzero(gradient.deltas[i].any(axis=-1)).tolist() == positive
        sampled.append({a: found[a] for a in positive + negative})
    np.testing.assert_allclose(terms["rpn_cls"].sum, cls, rtol=1e-5)
    np.testing.assert_allclose(terms["rpn_box"].sum, box, rtol=1e-5)
    assert terms["rpn_cls"].count == terms["rpn_box"].count == count
    return sampled


def test_anchors_match_a_loop():
    np.testing.assert_array_equal(rpn.anchors(3, 5), slow_anchors(3, 5))


ANCHOR = [80.0, 64, 112, 96]


@pytest.mark.parametrize(
    ("people", "owners"),
    [
        ([[83, 70, 118, 105]], [0]),
        # The best anchors of a person tie.
        ([[72, 60, 104, 116]], [0] * 4),
        ([[72, 72, 104, 104]], [0] * 8),
        # A later person takes what an earlier one had, who would have more of it or as much.
        ([ANCHOR, ANCHOR], [1]),
        ([ANCHOR, [81, 64, 113, 96]], [1]),
        ([[85, 70, 102.6, 87.6]], [0] * 3),  # 0.3025 of an anchor
        ([[85, 70, 102.5, 87.5]], []),  # 0.299 of an anchor
        ([[0, 40, 191, 70], [100, 0, 128, 127.5]], [0] * 7 + [1] * 3),
    ],
)
def test_assignment_matches_a_loop(people, owners: list[int]):
    (sampled,) = check_terms(batch_of(people, 128, 192), 8, 12)
    assert sorted(person for person in sampled.values() if person >= 0) == owners


def test_random_images_with_more_candidates_than_are_sampled_and_without_any():
    batch = random_batch(np.random.default_rng(3), images=3, people=5, bucket=(192, 256))
    assert 0 < batch.valid.sum() < batch.valid.size
    check_terms(batch, 12, 16)
    big = [[120, 130, 630, 640], [200, 210, 720, 735], [330, 180, 840, 700]]
    (sampled,) = check_terms(batch_of(big, 900, 1000), 57, 63)
    assert sum(person >= 0 for person in sampled.values()) == 128
    assert len(sampled) == 256
    check_terms(batch.replace(valid=np.zeros_like(batch.valid)), 12, 16)
    assert check_terms(batch.replace(size=np.full((3, 2), 20)), 12, 16) == [{}] * 3


def slow_propose(logits, deltas, size, extent, width: int):
    cells = np.arange(len(logits)) // 15
    valid = np.flatnonzero((cells // width < extent[0]) & (cells % width < extent[1]))
    order = valid[np.argsort(-logits[valid], kind="stable")][:12000]
    boxes, deltas = slow_anchors(len(logits) // 15 // width, width)[order], deltas[order]
    side, bound = boxes[:, 2:] - boxes[:, :2], F(np.log(62.5))
    center = (boxes[:, 2:] + boxes[:, :2]) / F(2) + side * deltas[:, :2]
    half = side * np.exp(np.clip(deltas[:, 2:], -bound, bound)) / F(2)
    boxes = np.concatenate([center - half, center + half], axis=1)
    boxes = np.clip(boxes, 0, np.tile(size[::-1], 2).astype(F))
    alive, kept = np.ones(len(boxes), bool), []
    for i, box in enumerate(boxes):
        if alive[i] and len(kept) < 2000:
            kept.append(box)
            alive[i + 1 :] &= ~(slow_iou(box, boxes[i + 1 :]) > F(0.7))
    return np.array(kept)


@pytest.mark.parametrize(("height", "width"), [(44, 60), (6, 9)])
def test_proposals_match_a_loop(height: int, width: int):
    """Neighbors have similar boxes, as in photos; some lie wholly outside and have no area."""
    rng = np.random.default_rng(height)
    outputs = outputs_of(rng, 2, height, width)
    ranks = rng.permuted(np.linspace(-4, 4, outputs.logits.size, dtype=F).reshape(2, -1), axis=1)
    deltas = outputs.deltas * np.array([0.2, 0.2, 0.8, 0.8], F)
    deltas[:, ::50] *= 30  # beyond the bound
    extent = np.array([[height, width - 2], [height - 3, width]])
    size = extent * 16 - np.array([[13, 0], [30, 21]])

    def found(outputs):
        boxes, valid = propose(outputs, size, extent, width=width)
        return boxes.sum(), (boxes, valid)

    outputs = RegionOutputs(ranks, deltas)
    gradient, (boxes, valid) = jax.grad(found, has_aux=True)(outputs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    for i in range(2):
        expected = slow_propose(ranks[i], deltas[i], size[i], extent[i], width)
        assert valid[i].tolist() == [k < len(expected) for k in range(2000)]
        np.testing.assert_allclose(boxes[i, : len(expected)], expected, rtol=1e-5, atol=1e-3)
        assert 0 < (expected[:, 2:] <= expected[:, :2]).any(axis=1).sum() < len(expected)


def test_the_bucket_changes_nothing():
    rng = np.random.default_rng(2)
    batch = random_batch(rng, images=4, people=3)
    small, large = (6, 8), (9, 13)
    outputs = outputs_of(rng, 4, *small)

    def widened(small_map, large_map):
        whole = large_map.reshape(4, *large, 15, -1)
        whole[:, : small[0], : small[1]] = small_map.reshape(4, *small, 15, -1)
        return whole.reshape(large_map.shape)

    wide = jax.tree.map(widened, outputs, outputs_of(rng, 4, *large))
    results = []
    for shape, maps in ((small, outputs), (large, wide)):
        draws = draw(jax.random.key(5), np.arange(4), shape, candidates=9, most=3)
        terms = rpn_terms(maps, batch, width=shape[1], draws=draws.rpn)
        proposals = propose(maps, batch.size, -(-batch.size // 32) * 2, width=shape[1])
        results.append((terms, proposals, draws.roi, draws.shuffle))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *results)
    terms, _, numbers, _ = results[0]
    assert terms["rpn_box"].sum > 0
    assert len(np.unique(numbers)) == numbers.size
