"""Losses against optax, closed forms and literal loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignps_jax.arrays import l2_normalize
from alignps_jax.losses import terms as losses
from tests.fakes import positives_of

# One compilation per shape instead of one per operation.
focal_loss = jax.jit(losses.focal_loss)
giou_loss = jax.jit(losses.giou_loss)
centerness_loss = jax.jit(losses.centerness_loss)
jit_triplet_loss = jax.jit(losses.triplet_loss)


def triplet_loss(embeddings, identity, where, lut, margin=0.3, first_lut_identity=0):
    people = positives_of(embeddings, identity, valid=where)
    return jit_triplet_loss(
        people, people, lut, offset=0, margin=margin, first_lut_identity=first_lut_identity
    )


def assert_all_finite(tree) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def assert_all_zero(tree) -> None:
    assert_all_finite(tree)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def test_l2_normalize_matches_numpy_and_handles_zero():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(x), expected, rtol=1e-5)
    assert l2_normalize(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
    value, gradient = jax.value_and_grad(lambda v: l2_normalize(v).sum())(jnp.zeros((2, 3)))
    assert_all_zero((value, gradient))


class TestFocal:
    @pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.5, 1.5)])
    def test_matches_optax(self, alpha: float, gamma: float):
        rng = np.random.default_rng(1)
        logits = jnp.asarray(rng.normal(0, 4, 50), jnp.float32)
        positive, where = rng.random(50) < 0.3, rng.random(50) < 0.7

        def ours(x):
            return focal_loss(x, positive, where, alpha=alpha, gamma=gamma)

        def reference(x):
            each = optax.sigmoid_focal_loss(
                x, positive.astype(np.float32), alpha=alpha, gamma=gamma
            )
            return jnp.sum(each, where=where)

        np.testing.assert_allclose(ours(logits), reference(logits), rtol=1e-5)
        np.testing.assert_allclose(
            jax.grad(ours)(logits), jax.grad(reference)(logits), rtol=1e-4, atol=1e-6
        )

    def test_extreme_logits(self):
        logits = jnp.array([1e4, -1e4, 1e4, -1e4, 200.0, -200.0])
        positive = jnp.array([True, True, False, False, True, False])

        def ours(x):
            return focal_loss(x, positive, jnp.ones(6, bool), alpha=0.25, gamma=2.0)

        value, gradient = jax.value_and_grad(ours)(logits)
        np.testing.assert_allclose(value, 1e4 * (0.25 + 0.75), rtol=1e-5)
        np.testing.assert_allclose(gradient, [0, -0.25, 0.75, 0, 0, 0], atol=1e-6)

    def test_mask_is_slicing_and_all_masked_is_zero(self):
        rng = np.random.default_rng(2)
        logits, positive = jnp.asarray(rng.normal(size=9)), rng.random(9) < 0.5
        where = rng.random(9) < 0.5

        def ours(x, p, w):
            return focal_loss(x, p, w, alpha=0.25, gamma=2.0)

        sliced = ours(logits[where], positive[where], np.ones(where.sum(), bool))
        np.testing.assert_allclose(ours(logits, positive, where), sliced, rtol=1e-6)
        assert_all_zero(jax.value_and_grad(ours)(logits, positive, np.zeros(9, bool)))


class TestGiou:
    def test_by_hand(self):
        # Boxes [-1,-1,1,1] and [-1,-1,3,1]: IoU 1/2, enclosing = union; the second is exact.
        term = giou_loss(
            jnp.array([[1.0, 1, 1, 1], [1, 2, 3, 4]]),
            jnp.array([[1.0, 1, 3, 1], [1, 2, 3, 4]]),
            jnp.array([0.5, 0.25]),
            jnp.ones(2, bool),
        )
        np.testing.assert_allclose([term.sum, term.count], [0.25, 0.75], atol=1e-6)

    def test_zero_distances_and_masked_zeros(self):
        zeros, target = jnp.zeros((3, 4)), jnp.array([[1.0, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0]])

        def total(x, where):
            return giou_loss(x, target, jnp.ones(3), where).sum

        value, gradient = jax.value_and_grad(total)(zeros, jnp.array([True, True, False]))
        assert_all_finite((value, gradient))
        assert_all_zero(jax.value_and_grad(total)(zeros, jnp.zeros(3, bool)))


class TestCenterness:
    def test_matches_closed_form(self):
        rng = np.random.default_rng(4)
        logits = rng.normal(0, 3, 11).astype(np.float32)
        target, where = rng.random(11).astype(np.float32), rng.random(11) < 0.6
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        expected = -(target * np.log(p) + (1 - target) * np.log(1 - p))[where].sum()
        term = centerness_loss(logits, target, where)
        np.testing.assert_allclose(term.sum, expected, rtol=1e-5)
        assert term.count == where.sum()

    def test_extreme_logits_and_all_masked(self):
        def total(x, where):
            return centerness_loss(x, jnp.array([0.0, 0.3, 1.0]), where).sum

        logits = jnp.array([1e4, -1e4, -1e4])
        value, gradient = jax.value_and_grad(total)(logits, jnp.ones(3, bool))
        np.testing.assert_allclose(value, 1e4 * (1 + 0.3 + 1), rtol=1e-5)
        np.testing.assert_allclose(gradient, [1, -0.3, -1], atol=1e-6)
        assert_all_zero(jax.value_and_grad(total)(logits, jnp.zeros(3, bool)))


def slow_triplet(embeddings, identity, where, lut, margin, first):
    """Sum and count, float64, sample by sample."""
    samples = []
    for f, i, w in zip(embeddings.astype(np.float64), identity, where, strict=True):
        if w:
            samples.append((f / np.linalg.norm(f), i))
            if lut is not None and i >= first:
                samples.append((lut[i].astype(np.float64), i))
    if len({i for _, i in samples}) < 2:
        return 0.0, 0
    total = 0.0
    for a, i in samples:
        positive = max(np.linalg.norm(a - b) for b, j in samples if j == i)
        negative = min(np.linalg.norm(a - b) for b, j in samples if j != i)
        total += max(0.0, margin + positive - negative)
    return total, len(samples)


class TestTriplet:
    def sample(self, seed: int):
        rng = np.random.default_rng(seed)
        embeddings = rng.normal(size=(19, 6)).astype(np.float32) * 3
        identity = rng.integers(0, 4, 19)
        where = rng.random(19) < 0.7
        lut = rng.normal(size=(5, 6)).astype(np.float32) * 0.3
        lut[2] = 0  # not written yet
        return embeddings, identity, where, lut

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("with_lut", [True, False])
    def test_matches_loop(self, seed: int, first: int, with_lut: bool):
        embeddings, identity, where, lut = self.sample(seed)
        lut = lut if with_lut else None
        term = triplet_loss(embeddings, identity, where, lut, 0.9, first)
        total, count = slow_triplet(embeddings, identity, where, lut, 0.9, first)
        assert total > 0
        np.testing.assert_allclose(term.sum, total, rtol=1e-5)
        assert term.count == count

    def test_gradient_matches_finite_differences(self):
        embeddings, identity, where, lut = self.sample(7)

        def total(x, table):
            return triplet_loss(x, identity, where, table).sum

        arguments = jnp.asarray(embeddings), jnp.asarray(lut)
        gradient, of_table = jax.grad(total, (0, 1))(*arguments)
        assert_all_zero(of_table)
        step = 1e-5
        for index in np.ndindex(embeddings.shape):
            ends = []
            for sign in (1, -1):
                moved = embeddings.astype(np.float64)
                moved[index] += sign * step
                ends.append(slow_triplet(moved, identity, where, lut, 0.3, 0)[0])
            np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2 * step), atol=1e-4)

    @pytest.mark.parametrize("people", [[], [3], [3, 3, 3]])
    @pytest.mark.parametrize("rows", [0, 4])
    def test_without_two_identities_there_are_no_triplets(self, people: list[int], rows: int):
        """A table has no rows where all people of the training set are unlabeled."""
        where = (np.arange(5) < len(people)) & (rows > 0)
        identity = np.array(people + [1] * (5 - len(people)))
        embeddings = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4)), jnp.float32)

        def total(x):
            return triplet_loss(x, identity, where, jnp.ones((rows, 4)))

        assert_all_zero((total(embeddings), jax.grad(lambda x: total(x).sum)(embeddings)))

    def test_duplicates_zero_vectors_and_zero_table_have_finite_gradients(self):
        embeddings = jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
        identity = jnp.array([0, 0, 1, 1, 2])

        def total(x):
            return triplet_loss(x, identity, jnp.ones(5, bool), jnp.zeros((3, 2))).sum

        value, gradient = jax.value_and_grad(total)(embeddings)
        assert_all_finite((value, gradient))
        assert value > 0

    @pytest.mark.parametrize("pairs", [2**24, 40])
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_shares_add_up_to_the_loss_and_gradient_of_all(self, parts, pairs, monkeypatch):
        monkeypatch.setattr(losses, "PAIRS_AT_ONCE", pairs)
        *people, lut = self.sample(5)
        embeddings, identity, where = (jnp.asarray(x)[:16] for x in people)

        def whole(x):
            term = triplet_loss(x, identity, where, lut)
            return term.sum, term.count

        def in_parts(x):
            gathered = positives_of(x, identity, valid=where)
            size = len(x) // parts
            shares = [
                losses.triplet_loss(
                    jax.tree.map(lambda v, offset=offset: v[offset : offset + size], gathered),
                    gathered,
                    lut,
                    offset=offset,
                    margin=0.3,
                    first_lut_identity=0,
                )
                for offset in range(0, len(x), size)
            ]
            return sum(share.sum for share in shares), sum(share.count for share in shares)

        expected, gradient = jax.value_and_grad(whole, has_aux=True)(embeddings)
        found, found_gradient = jax.value_and_grad(in_parts, has_aux=True)(embeddings)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        assert found[1] == expected[1] > 0
        np.testing.assert_allclose(found_gradient, gradient, atol=1e-6)
