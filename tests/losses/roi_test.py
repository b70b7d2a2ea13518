"""Sampled regions, their losses and what they write into the memory, against literal loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses import roi
from alignps_jax.losses.oim import update_memory
from alignps_jax.types import OIMMemory, RoiOutputs, Rois
from tests.fakes import NUM_IDENTITIES, random_batch
from tests.losses.oim_test import slow_loss, slow_update
from tests.losses.rpn_test import F, overlaps, slow_deltas, slow_sample

D, PROPOSALS = 6, 60
# One compilation per shape instead of one per operation.
sample_rois = jax.jit(roi.sample_rois, static_argnames="count")
roi_terms = jax.jit(roi.roi_terms)


def slow_rois(boxes, valid, people, exists, draws, count: int):
    """(box, person or None) of each sampled candidate."""
    usable = np.flatnonzero(exists)
    person = {int(g): int(g) for g in usable}
    negative = []
    for p in np.flatnonzero(valid):
        row = overlaps(boxes[p], people[usable]) if len(usable) else np.zeros(1)
        if row.max() >= F(0.5):
            person[len(people) + int(p)] = int(usable[np.argmax(row)])
        elif row.max() < F(0.1):
            negative.append(len(people) + int(p))
    first, others = slow_sample(person, negative, draws, count)
    candidates = np.concatenate([people, boxes])
    return [(candidates[i], person.get(i)) for i in first + others]


def sample(rng: np.random.Generator, images: int = 3, people: int = 4):
    """Proposals around people, elsewhere, and without area; some people are the same twice."""
    batch = random_batch(rng, images=images, people=people)
    batch.boxes[:, 2] = batch.boxes[:, 1]
    own = rng.integers(0, people, (images, PROPOSALS))
    near = np.take_along_axis(batch.boxes, own[..., None], 1)
    shift = rng.choice([0, 1, 4, 16, 200], (images, PROPOSALS, 1)) * rng.normal(size=near.shape)
    boxes = np.sort((near + shift).reshape(images, PROPOSALS, 2, 2), axis=2)
    boxes = boxes.reshape(near.shape).astype(F)
    boxes[:, ::9, 2:] = boxes[:, ::9, :2]
    valid = rng.random((images, PROPOSALS)) < 0.9
    return boxes, valid, batch, rng.random((images, people + PROPOSALS)).astype(F)


@pytest.mark.parametrize("count", [8, 30, 128])
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_sampled_regions_match_a_loop(count: int, chance: float):
    rng = np.random.default_rng(count)
    boxes, valid, batch, draws = sample(rng)
    batch = batch.replace(valid=rng.random(batch.valid.shape) < chance)
    rois = sample_rois(boxes, valid, batch, draws, count=count)
    numbers = set()
    for i in range(len(boxes)):
        expected = slow_rois(boxes[i], valid[i], batch.boxes[i], batch.valid[i], draws[i], count)
        size = len(expected)
        assert rois.valid[i].tolist() == [k < size for k in range(count)]
        numbers.add(size)
        for k, (box, person) in enumerate(expected):
            np.testing.assert_array_equal(rois.boxes[i, k], box)
            assert rois.positive[i, k] == (person is not None)
            if person is None:
                assert (rois.identity[i, k], rois.labeled[i, k]) == (0, False)
                assert not np.any(rois.deltas[i, k])
            else:
                assert rois.identity[i, k] == batch.identity[i, person]
                assert rois.labeled[i, k] == batch.labeled[i, person]
                deltas = np.array(slow_deltas(box, batch.boxes[i, person])) / [0.1, 0.1, 0.2, 0.2]
                np.testing.assert_allclose(rois.deltas[i, k], deltas, rtol=1e-4, atol=1e-5)
        rest = jax.tree.map(lambda x, i=i, size=size: x[i, size:], rois)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(rest))
    assert (max(numbers) < count) == (count == 128)


def test_a_person_of_the_annotations_is_its_own_even_where_two_are_the_same():
    boxes, _, batch, draws = sample(np.random.default_rng(1), images=1)
    batch = batch.replace(valid=np.ones_like(batch.valid), identity=np.array([[3, 1, 2, 5]]))
    rois = sample_rois(boxes, np.zeros((1, PROPOSALS), bool), batch, draws, count=8)
    assert rois.identity[0].tolist() == [3, 1, 2, 5, 0, 0, 0, 0]
    assert rois.valid[0].tolist() == rois.positive[0].tolist() == [True] * 4 + [False] * 4


def outputs_and_rois(seed: int, images: int = 3, count: int = 20):
    rng = np.random.default_rng(seed)
    boxes, valid, batch, draws = sample(rng, images)
    rois = sample_rois(boxes, valid, batch, draws, count=count)
    embeddings = rng.normal(size=(images, count, D))
    outputs = RoiOutputs(
        logits=jnp.asarray(rng.normal(0, 3, (images, count)), F),
        deltas=jnp.asarray(rng.normal(size=(images, count, 4)), F),
        embeddings=jnp.asarray(embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True), F),
    )
    memory = OIMMemory(
        lut=jnp.asarray(rng.normal(size=(NUM_IDENTITIES, D)), F),
        queue=jnp.asarray(rng.normal(size=(5, D)), F),
        tail=jnp.asarray(3, jnp.int32),
    )
    return outputs, rois, memory


def rows_of(outputs: RoiOutputs, rois: Rois):
    """Embeddings, identities, labeled, positive, one region after another."""
    flat = outputs.embeddings.reshape(-1, D), rois.identity, rois.labeled, rois.positive
    return [np.asarray(flat[0]), *(np.asarray(x).ravel() for x in flat[1:])]


def test_terms_match_closed_forms_and_shares_add_up():
    outputs, rois, memory = outputs_and_rois(0)
    terms = roi_terms(outputs, rois, memory)
    valid, positive = np.asarray(rois.valid), np.asarray(rois.positive)
    assert 0 < positive.sum() < valid.sum()
    p = 1 / (1 + np.exp(-np.float64(outputs.logits)))
    entropies = -np.where(positive, np.log(p), np.log(1 - p))
    errors = np.abs(np.float64(outputs.deltas) - rois.deltas)
    rows = rows_of(outputs, rois)
    expected = {
        "roi_cls": (entropies[valid].sum(), valid.sum()),
        "roi_box": (10 * errors[positive].sum(), valid.sum()),
        "roi_oim": (slow_loss(*rows, memory, 30, 30, 0), rois.labeled.sum()),
    }
    shares = [
        roi_terms(*jax.tree.map(lambda x, i=i: x[i : i + 1], (outputs, rois)), memory)
        for i in range(len(valid))
    ]
    for found in (terms, jax.tree.map(lambda *x: sum(x), *shares)):
        assert found.keys() == expected.keys()
        for name, (total, count) in expected.items():
            np.testing.assert_allclose(found[name].sum, total, rtol=1e-5, err_msg=name)
            assert found[name].count == count > 0


@pytest.mark.parametrize("missing", ["labeled", "positive", "valid"])
def test_without_regions_of_a_kind_terms_are_zero_and_gradients_finite(missing: str):
    outputs, rois, memory = outputs_and_rois(1)
    kinds = ["labeled", "positive", "valid"]
    for kind in kinds[: kinds.index(missing) + 1]:
        rois = rois.replace(**{kind: jnp.zeros_like(rois.valid)})

    def total(outputs):
        terms = roi_terms(outputs, rois, memory)
        return sum(term.sum for term in terms.values()), terms

    gradient, terms = jax.grad(total, has_aux=True)(outputs)
    assert terms["roi_oim"].sum == terms["roi_oim"].count == 0
    assert (terms["roi_box"].sum == 0) == (missing != "labeled")
    assert (terms["roi_cls"].sum == 0) == (missing == "valid")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient.embeddings)


def test_regions_write_into_the_memory_in_order():
    outputs, rois, memory = outputs_and_rois(2)
    rows = rows_of(outputs, rois)
    assert len(np.unique(rows[1][rows[2]])) < rows[2].sum()  # some identity has several regions
    assert (rows[3] & ~rows[2]).sum() > len(memory.queue)
    people = roi.people_of(rois, outputs.embeddings)
    result = update_memory(memory, people, momentum=0.5, normalize=True, queue_channels=None)
    lut, queue, tail = slow_update(memory, *rows, 0.5, True, None)
    np.testing.assert_allclose(result.lut, lut, atol=1e-6)
    np.testing.assert_allclose(result.queue, queue, atol=1e-6)
    assert result.tail == tail
