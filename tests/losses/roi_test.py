"""Sampled regions, their losses and what they write into the memory, against literal loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses import roi
from alignps_jax.losses.oim import update_memory
from alignps_jax.types import OIMMemory, RegionOutputs
from configs import cuhk
from tests.fakes import NUM_IDENTITIES, random_batch
from tests.losses.oim_test import slow_loss, slow_update
from tests.losses.rpn_test import F, slow_deltas, slow_iou, slow_sample

D, IMAGES, PROPOSALS = 6, 3, 60
# One compilation per shape instead of one per operation.
sample_rois = jax.jit(roi.sample_rois, static_argnames="count")
roi_terms = jax.jit(partial(roi.roi_terms, config=cuhk.get_config("roi").loss))


def sample(rng: np.random.Generator):
    """Proposals near people, elsewhere, and without area; two people have the same box."""
    batch = random_batch(rng, images=IMAGES)
    batch.boxes[:, 2] = batch.boxes[:, 1]
    near = np.take_along_axis(batch.boxes, rng.integers(0, 4, (IMAGES, PROPOSALS, 1)), 1)
    shift = rng.choice([0, 1, 4, 16, 200], (IMAGES, PROPOSALS, 1)) * rng.normal(size=near.shape)
    boxes = np.sort((near + shift).reshape(IMAGES, PROPOSALS, 2, 2), axis=2)
    boxes = boxes.reshape(near.shape).astype(F)
    boxes[:, ::9, 2:] = boxes[:, ::9, :2]
    valid = rng.random((IMAGES, PROPOSALS)) < 0.9
    # Of equal draws the first ones count.
    return boxes, valid, batch, rng.integers(0, 30, (IMAGES, 4 + PROPOSALS)).astype(F) / 30


@pytest.mark.parametrize("count", [8, 30, 128])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_sampled_regions_match_a_loop(count: int, share: float):
    rng = np.random.default_rng(count)
    boxes, valid, batch, draws = sample(rng)
    batch = batch.replace(valid=rng.random(batch.valid.shape) < share)
    rois = sample_rois(boxes, valid, batch, draws, count=count)
    for i, people in enumerate(batch.boxes):
        exists = np.flatnonzero(batch.valid[i])
        person, negative = {int(g): int(g) for g in exists}, []  # of positive ones
        for p in np.flatnonzero(valid[i]):
            row = slow_iou(boxes[i, p], people[exists])
            if max(row, default=0) >= F(0.5):
                person[4 + int(p)] = int(exists[np.argmax(row)])
            elif max(row, default=0) < F(0.1):
                negative.append(4 + int(p))
        first, others = slow_sample(person, negative, draws[i], count)
        candidates, number = np.concatenate([people, boxes[i]]), len(first + others)
        assert (number < count) == (count == 128)
        assert rois.boxes.shape[1] == min(count, 4 + PROPOSALS)
        own = np.array([person[k] for k in first], int)
        units = np.array([0.1, 0.1, 0.2, 0.2], F)
        deltas = [slow_deltas(candidates[k], people[person[k]]) / units for k in first]
        expected = (
            (rois.boxes, candidates[first + others]),
            (rois.valid, np.ones(number)),
            (rois.positive, np.ones(len(first))),
            (rois.deltas, np.reshape(deltas, (-1, 4))),
            (rois.identity, batch.identity[i, own]),
            (rois.labeled, batch.labeled[i, own]),
        )
        for found, rows in expected:  # and zero after these
            rows = np.concatenate([rows, np.zeros((len(found[i]) - len(rows), *rows.shape[1:]))])
            np.testing.assert_allclose(found[i], rows, rtol=1e-4, atol=1e-5)


def outputs_and_rois():
    """Also embeddings, identities, labeled, positive: all regions in order."""
    rng = np.random.default_rng(2)
    rois = sample_rois(*sample(rng), count=30)
    shapes = (IMAGES, 30), (IMAGES, 30, 4), (IMAGES, 30, D), (NUM_IDENTITIES, D), (5, D)
    *outputs, lut, queue = (jnp.asarray(rng.normal(size=shape), F) for shape in shapes)
    kinds = (np.ravel(x) for x in (rois.identity, rois.labeled, rois.positive))
    rows = np.asarray(outputs[2]).reshape(-1, D), *kinds
    return RegionOutputs(*outputs), rois, OIMMemory(lut / 5, queue / 5, jnp.int32(3)), rows


def test_terms_and_memory_match_loops_and_shares_add_up():
    outputs, rois, memory, rows = outputs_and_rois()
    valid, positive = np.asarray(rois.valid), np.asarray(rois.positive)
    z = np.where(positive, outputs.logits, -outputs.logits)
    errors = np.abs(outputs.deltas - rois.deltas)
    expected = {
        "roi_cls": (np.log1p(np.exp(-z))[valid].sum(), valid.sum()),
        "roi_box": (10 * errors[positive].sum(), valid.sum()),
        "roi_oim": (slow_loss(*rows, memory, 30, 30, 0), rois.labeled.sum()),
    }
    shares = [
        roi_terms(*jax.tree.map(lambda x, i=i: x[i : i + 1], (outputs, rois)), memory)
        for i in range(IMAGES)
    ]
    for found in (roi_terms(outputs, rois, memory), jax.tree.map(lambda *x: sum(x), *shares)):
        assert found.keys() == expected.keys()
        for name, (total, count) in expected.items():
            np.testing.assert_allclose(found[name].sum, total, rtol=1e-5, err_msg=name)
            assert found[name].count == count > 0
    assert len(np.unique(rows[1][rows[2]])) < rows[2].sum()  # an identity has several regions
    assert (rows[3] & ~rows[2]).sum() > len(memory.queue)
    people = roi.people_of(rois, outputs.embeddings)
    result = update_memory(memory, people, momentum=0.5, normalize=True, queue_channels=None)
    lut, queue, tail = slow_update(memory, *rows, 0.5, True, None)
    np.testing.assert_allclose(result.lut, lut, atol=1e-6)
    np.testing.assert_allclose(result.queue, queue, atol=1e-6)
    assert result.tail == tail


def test_without_regions_of_a_kind_terms_are_zero_and_gradients_finite():
    outputs, rois, memory, _ = outputs_and_rois()
    for missing, zeros in [("labeled", 1), ("positive", 2), ("valid", 3)]:
        rois = rois.replace(**{missing: jnp.zeros_like(rois.valid)})

        def total(outputs, rois=rois):
            terms = roi_terms(outputs, rois, memory)
            return sum(term.sum for term in terms.values()), terms

        gradient, terms = jax.grad(total, has_aux=True)(outputs)
        names = ["roi_oim", "roi_box", "roi_cls"]
        assert [terms[name].sum == 0 for name in names] == [k < zeros for k in range(3)]
        assert terms["roi_oim"].count == 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert not np.any(gradient.embeddings)
