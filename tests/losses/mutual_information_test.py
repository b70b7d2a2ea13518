"""The mutual information term and its gradients against a loop over identities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses.mutual_information import mutual_information
from alignps_jax.types import People, RoiDraws

D, K = 5, 8
CASES = {  # of each region, and of each positive location: the identity, or -1 if unknown
    "many": ([6, 2, -1, 6, 4, 9, -1, 2, 0, 6], [0, 6, 3, 2, -1, 6, 4, 4, 2, 2, -1]),
    "two": ([3, -1, 1, 3], [-1, 1, 3]),
    "one": ([-1, 7, 7, 5, -1], [7, 7, -1, 8]),
    "none": ([5, -1, 2], [3, -1, 4]),
    "nobody": ([-1, -1], [-1, -1, -1]),
}


def network(params, u, v):
    weights, bias, last = params
    return jax.nn.relu(jnp.concatenate([u, v], -1) @ weights + bias) @ last


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def slow_term(arguments, name: str, shuffle):
    params, *branches = arguments
    regions_of, dense_of = CASES[name]
    common = [i for i in dict.fromkeys(regions_of) if i >= 0 and i in dense_of]
    if len(common) < 2:
        return 0.0
    joint = marginal = 0
    means = [
        [unit(unit(x[np.array(of) == i]).mean(0)) for i in common]
        for x, of in zip(branches, CASES[name], strict=True)
    ]
    for k, (u, v) in enumerate(zip(*means, strict=True)):
        other = means[1][int(np.floor(len(common) * np.float64(shuffle[k])))]
        joint += network(params, u, v) / len(common)
        marginal += jnp.exp(network(params, u, other)) / len(common)
    return -0.2 * (joint - jnp.log(marginal))


def people(embeddings, identity) -> People:
    """Unknown people are unlabeled or not valid, by turns, with an identity that would matter."""
    known, even = np.array(identity) >= 0, np.arange(len(identity)) % 2 == 0
    return People(known | even, embeddings, np.where(known, identity, 4), known | ~even)


@partial(jax.jit, static_argnames="name")
def value_and_gradient(arguments, name: str, gate, shuffle):
    def loss(arguments):
        params, *embeddings = arguments
        rows = (people(x, of) for x, of in zip(embeddings, CASES[name], strict=True))
        draws = RoiDraws(jnp.zeros((1, 1)), jnp.zeros((1, 1)), gate, shuffle)
        known = 10 if name != "nobody" else 0
        term = mutual_information(*rows, lambda *x: network(params, *x), draws, known)
        return term.sum / term.count

    return jax.value_and_grad(loss)(arguments)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_a_loop(name: str):
    """In a third of the 99 numbers that the gate stands for, both branches learn, too."""
    rng = np.random.default_rng(0)
    shapes = (2 * D, 6), (6,), (6,), *((len(of), D) for of in CASES[name])
    *params, regions, dense = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    arguments = params, unit(regions), dense * 4
    shuffle = rng.random(K).astype(np.float32)
    shuffle[:3] = 0, 1 - 2**-24, 0  # with replacement
    expected = jax.jit(jax.value_and_grad(lambda x: slow_term(x, name, shuffle)))(arguments)
    matters = name in ("many", "two")
    assert (expected[0] != 0) == matters
    for number in range(1, 100) if name == "two" else (1, 98, 99):
        value, gradient = value_and_gradient(arguments, name, (number - 0.5) / 99, shuffle)
        np.testing.assert_allclose(value, expected[0], atol=1e-6)
        assert (value != 0) == matters  # exactly nothing to learn from one identity or none
        learns = expected[1][0], *(x * (number % 3 == 0) for x in expected[1][1:])
        for leaf, other in zip(*map(jax.tree.leaves, (gradient, learns)), strict=True):
            np.testing.assert_allclose(leaf, other, atol=1e-5)
            assert np.any(leaf) == (matters and np.any(other))
