"""OIM loss and memory against a literal one-by-one implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses import oim
from alignps_jax.types import OIMMemory
from tests.fakes import positives_of

L, Q, D = 6, 5, 8

# One compilation per shape instead of one per operation.
oim_loss = jax.jit(oim.oim_loss)
update_memory = jax.jit(oim.update_memory, static_argnames=("normalize", "queue_channels"))


def filled_memory(rng: np.random.Generator, queue_size: int = Q, tail: int = 3) -> OIMMemory:
    return OIMMemory(
        lut=jnp.asarray(rng.normal(size=(L, D)), jnp.float32),
        queue=jnp.asarray(rng.normal(size=(queue_size, D)), jnp.float32),
        tail=jnp.asarray(tail, jnp.int32),
    )


def sample(seed: int, count: int = 24):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, D)).astype(np.float32) * 4
    identity = rng.integers(0, L - 1, count)  # the last identity is absent, others repeat
    labeled, mask = rng.random(count) < 0.6, rng.random(count) < 0.8
    return embeddings, np.where(labeled, identity, -1), labeled, mask, rng


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x)
    return x / length if length > 0 else x


def slow_loss(embeddings, identity, labeled, mask, memory, t, t_queue, gamma):
    total = 0.0
    for f, i, known, used in zip(embeddings, identity, labeled, mask, strict=True):
        if known and used:
            f = unit(f.astype(np.float64))
            scores = [t * f @ row for row in np.asarray(memory.lut)]
            scores += [t_queue * f @ row for row in np.asarray(memory.queue)]
            p = np.exp(scores[i]) / np.sum(np.exp(scores))
            total += -((1 - p) ** gamma) * np.log(p)
    return total


def slow_update(memory, embeddings, identity, labeled, mask, momentum, normalize, channels):
    lut, queue = np.array(memory.lut, np.float64), np.array(memory.queue, np.float64)
    tail = int(memory.tail)
    for f, i, known, used in zip(embeddings, identity, labeled, mask, strict=True):
        f = unit(f.astype(np.float64))
        if used and known:
            lut[i] = momentum * lut[i] + (1 - momentum) * f
            lut[i] = unit(lut[i]) if normalize else lut[i]
        elif used and len(queue):
            queue[tail, :channels] = f[:channels]
            tail = (tail + 1) % len(queue)
    return lut, queue, tail


def loss(embeddings, identity, labeled, mask, memory, t=10.0, t_queue=7.0, gamma=2.0):
    return oim_loss(
        positives_of(embeddings, identity, labeled, mask),
        memory,
        inverse_lut_temperature=t,
        inverse_queue_temperature=t_queue,
        focal_gamma=gamma,
    )


def update(memory, *positives, momentum=0.5, normalize=False, channels=None):
    return update_memory(
        memory,
        positives_of(*positives),
        momentum=momentum,
        normalize=normalize,
        queue_channels=channels,
    )


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.5])
@pytest.mark.parametrize("queue_size", [0, Q])
def test_loss_matches_loop(gamma: float, queue_size: int):
    *positives, rng = sample(0)
    memory = filled_memory(rng, queue_size)
    term = loss(*positives, memory, 3.0, 2.0, gamma)
    np.testing.assert_allclose(term.sum, slow_loss(*positives, memory, 3.0, 2.0, gamma), rtol=1e-5)
    assert term.count == positives[-1].sum()


def test_loss_gradient_matches_finite_differences():
    embeddings, identity, labeled, mask, rng = sample(1, count=6)
    memory = filled_memory(rng)
    rest = (identity, labeled, mask, memory)
    gradient, of_table = jax.grad(
        lambda x, lut: loss(x, *rest[:3], memory.replace(lut=lut), 3.0, 2.0).sum, (0, 1)
    )(jnp.asarray(embeddings), memory.lut)
    assert not np.any(of_table)
    step = 1e-5
    for index in np.ndindex(embeddings.shape):
        shift = np.zeros(embeddings.shape)
        shift[index] = step
        ends = [slow_loss(embeddings + s * shift, *rest, 3.0, 2.0, 2.0) for s in (1, -1)]
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2 * step), atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_and_hopeless_predictions_have_finite_gradients(gamma: float):
    memory = OIMMemory(jnp.eye(2, D) * 100, jnp.zeros((1, D)), jnp.zeros((), jnp.int32))
    embeddings = jnp.eye(2, D)
    for identity, expected in [([0, 1], 0.0), ([1, 0], 2 * 1000.0)]:
        value, gradient = jax.value_and_grad(
            lambda x, i=identity: (
                loss(x, jnp.array(i), *np.ones((2, 2), bool), memory, gamma=gamma).sum
            )
        )(embeddings)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.isfinite(gradient).all()


def test_all_masked_is_zero_without_gradient():
    embeddings, identity, labeled, mask, rng = sample(3)
    memory = filled_memory(rng)

    def total(x):
        return loss(x, identity, labeled, np.zeros_like(mask), memory).sum

    for x in (embeddings, np.zeros_like(embeddings)):
        value, gradient = jax.value_and_grad(total)(jnp.asarray(x))
        assert value == 0
        assert not np.any(gradient)


@pytest.mark.parametrize("queue_size", [0, Q])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("channels", [None, 3])
def test_update_matches_loop(queue_size: int, normalize: bool, channels: int | None):
    *positives, rng = sample(queue_size, count=60)
    memory = filled_memory(rng, queue_size, tail=3 if queue_size else 0)
    assert (~positives[2] & positives[3]).sum() > Q  # the queue wraps, the last ones win
    result = update(memory, *positives, momentum=0.7, normalize=normalize, channels=channels)
    lut, queue, tail = slow_update(memory, *positives, 0.7, normalize, channels)
    np.testing.assert_allclose(result.lut, lut, atol=1e-6)
    np.testing.assert_allclose(result.queue, queue, atol=1e-6)
    assert result.tail == tail
    assert result.tail.dtype == jnp.int32


@pytest.mark.parametrize("queue_size", [0, Q])
def test_a_table_of_no_rows(queue_size: int):
    """A training set without labeled people: they count, and only the queue changes."""
    embeddings, identity, _, mask, rng = sample(9)
    memory = filled_memory(rng, queue_size, tail=0).replace(lut=jnp.zeros((0, D)))
    positives = identity, np.zeros(len(mask), bool), mask
    term, gradient = jax.value_and_grad(
        lambda x: (lambda term: (term.sum, term))(loss(x, *positives, memory)), has_aux=True
    )(jnp.asarray(embeddings))
    assert (term[0], term[1].count) == (0, mask.sum())
    assert not np.any(gradient)
    result = update(memory, embeddings, *positives, normalize=True)
    _, queue, tail = slow_update(memory, embeddings, *positives, 0.5, True, None)
    assert result.lut.shape == (0, D)
    np.testing.assert_allclose(result.queue, queue, atol=1e-6)
    assert result.tail == tail


@pytest.mark.parametrize(("used", "identities"), [(False, [0]), (True, [-1, L, L + 100, -L])])
def test_what_is_masked_or_out_of_range_is_written_nowhere(used: bool, identities: list[int]):
    embeddings, _, _, _, rng = sample(7)
    memory, flags = filled_memory(rng), np.ones(24, bool)
    result = update(memory, embeddings, rng.choice(identities, 24), flags, flags & used)
    jax.tree.map(np.testing.assert_array_equal, result, memory)
