"""Anchors, assignment, sampling and proposals against literal loops in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses import rpn
from alignps_jax.losses.roi import draw
from alignps_jax.types import Batch, RpnOutputs
from tests.fakes import random_batch

# One compilation per shape instead of one per operation.
rpn_terms = jax.jit(rpn.rpn_terms, static_argnames="width")
propose = jax.jit(rpn.propose, static_argnames=("width", "pre_nms", "limit"))
sample = jax.jit(rpn.sample, static_argnames="count")
F = np.float32


def slow_anchors(height: int, width: int) -> np.ndarray:
    boxes = []
    for y in range(height):
        for x in range(width):
            for ratio in (0.5, 1, 2):
                for scale in (2, 4, 8, 16, 32):
                    w = F(16 * scale) / np.sqrt(F(ratio))
                    h = F(16 * scale) * np.sqrt(F(ratio))
                    corners = [-w / F(2), -h / F(2), w / F(2), h / F(2)]
                    shift = [F(16 * x), F(16 * y)] * 2
                    boxes.append([c + s for c, s in zip(corners, shift, strict=True)])
    return np.array(boxes, F)


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU in float32, every operation rounded."""
    box, others = F(box), F(others)
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    w, h = np.maximum(high - low, F(0)).T
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return w * h / np.maximum(area + areas - w * h, F(1e-6))


def slow_deltas(box: np.ndarray, target: np.ndarray) -> list[float]:
    (w, h), (tw, th) = box[2:] - box[:2], target[2:] - target[:2]
    x, y = (target[:2] + target[2:]) / 2 - (box[:2] + box[2:]) / 2
    return [x / w, y / h, np.log(tw / w), np.log(th / h)]


def slow_assign(boxes: np.ndarray, size, people: np.ndarray) -> dict[int, int]:
    """Of anchors: the person of positive ones, -1 of negative ones."""
    height, width = size
    inside = [
        a for a, (x, y, r, b) in enumerate(boxes) if x >= 0 and y >= 0 and r < width and b < height
    ]
    found, table = {}, [overlaps(boxes[a], people) for a in inside]
    for a, row in zip(inside, table, strict=True):
        if len(row) == 0 or max(row) < F(0.3):
            found[a] = -1
        elif max(row) >= F(0.7):
            found[a] = int(np.argmax(row))
    for person in range(len(people) if inside else 0):
        best = max(row[person] for row in table)
        for a, row in zip(inside, table, strict=True):
            if best >= F(0.3) and row[person] == best:
                found[a] = person
    return found


def slow_sample(positive, negative, draws, count: int) -> tuple[list[int], list[int]]:
    """The indices of sampled positive and negative candidates."""
    first = sorted(sorted(positive, key=lambda i: draws[i])[: count // 2])
    return first, sorted(sorted(negative, key=lambda i: draws[i])[: count - len(first)])


def slow_terms(outputs, batch: Batch, width: int, draws):
    """Sums, their common count, and the people of the sampled anchors of each image."""
    boxes = slow_anchors(outputs.logits.shape[1] // 15 // width, width)
    cls = box = count = 0
    sampled = []
    for i in range(len(draws)):
        people = batch.boxes[i][batch.valid[i]]
        found = slow_assign(boxes, batch.size[i], people)
        positive = [a for a, person in found.items() if person >= 0]
        negative = [a for a, person in found.items() if person < 0]
        positive, negative = slow_sample(positive, negative, draws[i], 256)
        logits, deltas = np.float64(outputs.logits[i]), np.float64(outputs.deltas[i])
        cls += np.log1p(np.exp(-logits[positive])).sum() + np.log1p(np.exp(logits[negative])).sum()
        for a in positive:
            box += np.abs(deltas[a] - slow_deltas(boxes[a], people[found[a]])).sum()
        count += max(len(positive), 1) + max(len(negative), 1)
        sampled.append({a: found[a] for a in positive + negative})
    return cls, box, count, sampled


def outputs_of(rng: np.random.Generator, images: int, height: int, width: int) -> RpnOutputs:
    shape = (images, height * width * 15)
    return RpnOutputs(
        logits=rng.normal(size=shape).astype(F), deltas=rng.normal(0, 0.5, (*shape, 4)).astype(F)
    )


def batch_of(people: list[list[float]], height: int, width: int, images: int = 1) -> Batch:
    """The same people in images of one size."""
    batch = random_batch(np.random.default_rng(0), images=images, people=len(people))
    boxes = np.broadcast_to(np.array(people, F), (images, len(people), 4))
    size = np.broadcast_to(np.array([height, width], np.int32), (images, 2))
    return batch.replace(boxes=boxes, size=size, valid=np.ones(boxes.shape[:2], bool))


def check_terms(batch: Batch, height: int, width: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    outputs = outputs_of(rng, len(batch.size), height, width)
    draws = rng.random(outputs.logits.shape).astype(F)
    cls, box, count, sampled = slow_terms(outputs, batch, width, draws)

    def sums(outputs):
        terms = rpn_terms(outputs, batch, width=width, draws=draws)
        return terms["rpn_cls"].sum + terms["rpn_box"].sum, terms

    gradient, terms = jax.grad(sums, has_aux=True)(outputs)
    np.testing.assert_allclose(terms["rpn_cls"].sum, cls, rtol=1e-5)
    np.testing.assert_allclose(terms["rpn_box"].sum, box, rtol=1e-5)
    assert terms["rpn_cls"].count == terms["rpn_box"].count == count
    for i, expected in enumerate(sampled):  # the gradient tells who was sampled, and as what
        found = np.flatnonzero(gradient.logits[i])
        assert found.tolist() == sorted(expected)
        assert (gradient.logits[i][found] < 0).tolist() == [expected[a] >= 0 for a in found]
        has_box = np.flatnonzero(np.any(gradient.deltas[i], axis=-1))
        assert has_box.tolist() == sorted(a for a in expected if expected[a] >= 0)
    return sampled


def test_anchors_match_a_loop():
    np.testing.assert_array_equal(rpn.anchors(3, 5), slow_anchors(3, 5))


CENTER = [80.0, 72, 112, 104]  # an anchor of the smallest scale, and half a cell beside it
CASES = {
    "one of 0.7 and more": [[83, 70, 118, 105]],
    "two of a scale tie below 0.7": [[72, 60, 104, 116]],
    "four of a scale tie below 0.7": [[8 + 64, 8 + 64, 72 + 32, 72 + 32]],
    "the first of equal people, then the last one takes the best": [CENTER, CENTER],
    "a later person takes what an earlier one had": [CENTER, [81, 72, 113, 104]],
    "nobody reaches 0.3": [[3, 3, 10, 12]],
    "wide and tall": [[0, 40, 191, 70], [100, 0, 128, 127.5]],
}


@pytest.mark.parametrize("name", CASES)
def test_assignment_matches_a_loop(name: str):
    sampled = check_terms(batch_of(CASES[name], 128, 192), 8, 12)[0]
    assert (max(sampled.values()) < 0) == (name == "nobody reaches 0.3")
    if "tie" in name:
        assert sum(person >= 0 for person in sampled.values()) == {"t": 4, "f": 8}[name[0]]
    if "last" in name:
        assert set(sampled.values()) == {-1, 1}


def test_random_images_and_more_candidates_than_are_sampled():
    rng = np.random.default_rng(3)
    batch = random_batch(rng, images=3, people=5, bucket=(192, 256))
    assert 0 < batch.valid.sum() < batch.valid.size
    check_terms(batch, 12, 16, seed=4)
    big = [[120, 130, 630, 640], [200, 210, 720, 735], [330, 180, 840, 700]]
    (sampled,) = check_terms(batch_of(big, 900, 1000), 57, 63)
    assert sum(person >= 0 for person in sampled.values()) == 128
    assert len(sampled) == 256


def test_without_people_or_candidates_values_and_gradients_are_finite():
    nobody = batch_of([[0.0, 0, 0, 0]], 128, 192, images=2)
    nobody = nobody.replace(valid=np.zeros((2, 1), bool))
    sampled = check_terms(nobody, 8, 12)
    assert set(sampled[0].values()) == {-1}
    assert check_terms(nobody.replace(size=np.full((2, 2), 20)), 8, 12) == [{}, {}]


@pytest.mark.parametrize("count", [6, 20, 80])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_sampling_matches_a_loop(count: int, share: float):
    rng = np.random.default_rng(count)
    kind, draws = rng.random(50), rng.random(50).astype(F)
    draws[rng.integers(0, 50, 10)] = draws[7]  # of equal numbers the first ones
    positive, negative = kind < share, (kind >= share) & (kind < share + 0.3)
    first, others = slow_sample(np.flatnonzero(positive), np.flatnonzero(negative), draws, count)
    index, is_positive, used = sample(positive, negative, draws, count=count)
    assert index[used].tolist() == [*first, *others]
    expected = np.arange(count)
    assert is_positive.tolist() == (expected < len(first)).tolist()
    assert used.tolist() == (expected < len(first) + len(others)).tolist()


def slow_propose(logits, deltas, size, extent, width: int, pre_nms: int, limit: int):
    boxes = slow_anchors(len(logits) // 15 // width, width)
    cells = np.arange(len(logits)) // 15
    valid = np.flatnonzero((cells // width < extent[0]) & (cells % width < extent[1]))
    order = valid[np.argsort(-logits[valid], kind="stable")][:pre_nms]
    boxes, deltas = boxes[order], deltas[order]
    side, center = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / F(2)
    center = center + side * deltas[:, :2]
    half = side * np.exp(np.clip(deltas[:, 2:], -F(np.log(62.5)), F(np.log(62.5)))) / F(2)
    boxes = np.concatenate([center - half, center + half], axis=1)
    boxes = np.clip(boxes, 0, np.array([*size[::-1], *size[::-1]], F))
    alive, kept = np.ones(len(boxes), bool), []
    for i, box in enumerate(boxes):
        if alive[i] and len(kept) < limit:
            kept.append(box)
            alive[i + 1 :] &= ~(overlaps(box, boxes[i + 1 :]) > F(0.7))
    return np.array(kept)


@pytest.mark.parametrize(
    ("shape", "pre_nms", "limit"), [((44, 60), 12000, 2000), ((6, 9), 700, 90)]
)
def test_proposals_match_a_loop(shape: tuple[int, int], pre_nms: int, limit: int):
    """Neighbors have similar boxes, as in photos; some lie wholly outside and have no area."""
    height, width = shape
    rng = np.random.default_rng(limit)
    outputs = outputs_of(rng, 2, height, width)
    ranks = rng.permuted(np.tile(np.linspace(-4, 4, height * width * 15, dtype=F), (2, 1)), axis=1)
    deltas = outputs.deltas * np.array([0.2, 0.2, 0.8, 0.8], F)
    outputs = outputs.replace(logits=ranks, deltas=deltas)
    outputs.deltas[:, ::50] *= 30  # beyond the bound
    extent = np.array([[height, width - 2], [height - 3, width]])
    size = extent * 16 - np.array([[13, 0], [30, 21]])
    boxes, valid = propose(outputs, size, extent, width=width, pre_nms=pre_nms, limit=limit)
    assert boxes.shape == (2, limit, 4)
    for i in range(2):
        expected = slow_propose(
            outputs.logits[i], outputs.deltas[i], size[i], extent[i], width, pre_nms, limit
        )
        assert valid[i].tolist() == [k < len(expected) for k in range(limit)]
        np.testing.assert_allclose(boxes[i, : len(expected)], expected, rtol=1e-5, atol=1e-3)
        empty = (expected[:, 2:] <= expected[:, :2]).any(axis=1)
        assert 0 < empty.sum() < len(expected)


def test_proposals_have_no_gradient():
    outputs = jax.tree.map(jnp.asarray, outputs_of(np.random.default_rng(1), 1, 6, 9))
    size = np.array([[90, 130]])
    gradient = jax.grad(lambda x: propose(x, size, size // 16, width=9)[0].sum())(outputs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_neither_the_bucket_nor_the_share_of_a_device_changes_anything():
    rng = np.random.default_rng(2)
    batch = random_batch(rng, images=4, people=3)
    small, large = (6, 8), (9, 13)
    outputs = outputs_of(rng, 4, *small)

    def widened(small_map, large_map):
        whole = large_map.reshape(4, *large, 15, -1).copy()
        whole[:, : small[0], : small[1]] = small_map.reshape(4, *small, 15, -1)
        return whole.reshape(large_map.shape)

    extent = -(-batch.size // 32) * 2
    buckets = (small, outputs), (large, jax.tree.map(widened, outputs, outputs_of(rng, 4, *large)))
    results = []
    for shape, maps in buckets:
        for images in (4, 2, 1):
            terms, rows = [], []
            for first in range(0, 4, images):
                draws = draw(jax.random.key(5), images, first, shape, candidates=9, identities=3)
                own = slice(first, first + images)
                mine, people = jax.tree.map(lambda x, own=own: x[own], (maps, batch))
                terms.append(rpn_terms(mine, people, width=shape[1], draws=draws.rpn))
                boxes = propose(mine, people.size, extent[own], width=shape[1], limit=300)
                rows.append((boxes, draws.roi, draws.gate + jnp.zeros(images)))
            total = jax.tree.map(lambda *x: sum(x), *terms)
            results.append((total, jax.tree.map(lambda *x: np.concatenate(x), *rows)))
    for result in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), result, results[0])
    total, (_, numbers, _) = results[0]
    assert total["rpn_box"].sum > 0
    assert len(np.unique(numbers)) == numbers.size
