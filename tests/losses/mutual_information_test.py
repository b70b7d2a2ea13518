"""The mutual information term against a loop and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses.mutual_information import mutual_information
from alignps_jax.types import People, RoiDraws

D, K = 5, 8
GATES = {"T alone": [0.0, 1.5 / 99, 97.5 / 99], "both": [2.5 / 99, 0.99]}


def network(params, u, v):
    """T; like `slow_term` it works on NumPy's and JAX's arrays."""
    weights, bias, last = params
    hidden = (u @ weights[:D] + v @ weights[D:]) + bias
    return (hidden * (hidden > 0)) @ last


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_term(params, regions, dense, regions_of, dense_of, shuffle) -> float:
    """In float64; the first argument says, of each row, the identity, or -1 for nobody known."""
    common = [i for i in dict.fromkeys(regions_of) if i >= 0 and i in dense_of]
    if not common:
        return 0.0
    u = [unit(unit(regions[np.array(regions_of) == i]).mean(0)) for i in common]
    v = [unit(unit(dense[np.array(dense_of) == i]).mean(0)) for i in common]
    other = [v[int(np.floor(len(common) * shuffle[k]))] for k in range(len(common))]
    joint = np.mean([network(params, a, b) for a, b in zip(u, v, strict=True)])
    marginal = np.mean([np.exp(network(params, a, b)) for a, b in zip(u, other, strict=True)])
    return -0.2 * (joint - np.log(marginal))


def people(embeddings, identity) -> People:
    """Unknown people are unlabeled or not valid, by turns, with identities that would matter."""
    known, even = np.array(identity) >= 0, np.arange(len(identity)) % 2 == 0
    return People(known | even, embeddings, np.where(known, identity, 4), known | ~even)


def sample(regions_of, dense_of, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = (2 * D, 6), (6,), (6,)
    params = tuple(rng.normal(size=shape) for shape in shapes)
    regions, dense = rng.normal(size=(len(regions_of), D)), rng.normal(size=(len(dense_of), D)) * 4
    return (params, unit(regions), dense), rng.random(K).astype(np.float32)


@jax.jit
def value_and_gradient(arguments, regions_of, dense_of, gate, shuffle):
    def loss(arguments):
        params, regions, dense = arguments
        draws = RoiDraws(np.zeros((1, 1)), np.zeros((1, 1)), gate, shuffle)
        u, v = regions_of.replace(embeddings=regions), dense_of.replace(embeddings=dense)
        term = mutual_information(u, v, lambda *x: network(params, *x), draws)
        return term.sum, term.count

    (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(arguments)
    return value, count, gradient


def found(arguments, regions_of, dense_of, gate, shuffle):
    rows = [people(x, i) for x, i in zip(arguments[1:], (regions_of, dense_of), strict=True)]
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments)
    value, count, gradient = value_and_gradient(arguments, *rows, np.float32(gate), shuffle)
    assert count == 1
    return value, gradient


CASES = {
    "many": ([6, 2, -1, 6, 4, 9, -1, 2, 0, 6], [0, 6, 3, 2, -1, 6, 4, 4, 2, 2, -1]),
    "two": ([3, -1, 1, 3], [-1, 1, 3]),
    "one": ([-1, 7, 7, 5, -1], [7, 7, -1, 8]),
    "none": ([5, -1, 2], [3, -1, 4]),
    "nobody": ([-1, -1], [-1, -1, -1]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("learn", GATES)
def test_values_and_gradients_match_a_loop(name: str, learn: str):
    arguments, shuffle = sample(*CASES[name])
    rest = *CASES[name], shuffle
    expected = slow_term(*arguments, *rest)
    leaves, tree = jax.tree.flatten(arguments)
    differences = []
    for number, leaf in enumerate(leaves):
        of_leaf = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in leaves]
                moved[number][index] += step
                ends.append(slow_term(*jax.tree.unflatten(tree, moved), *rest))
            of_leaf[index] = (ends[0] - ends[1]) / 2e-6
        differences.append(of_leaf)
    for gate in GATES[learn]:
        value, gradient = found(arguments, *CASES[name], gate, shuffle)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert value == 0 or name in ("many", "two")
        for number, leaf in enumerate(jax.tree.leaves(gradient)):
            learns = number < 3 or learn == "both"
            np.testing.assert_allclose(leaf, differences[number] * learns, atol=1e-5)
            assert np.any(leaf) == (learns and name in ("many", "two"))


def test_a_third_of_the_numbers_lets_both_branches_learn():
    arguments, shuffle = sample(*CASES["two"])
    learned = []
    for number in range(99):
        _, (_, of_regions, of_dense) = found(arguments, *CASES["two"], (number + 0.5) / 99, shuffle)
        assert np.any(of_regions) == np.any(of_dense)
        learned.append(bool(np.any(of_dense)))
    assert learned == [False, False, True] * 33


def test_the_shuffle_draws_with_replacement():
    """Rows may repeat; with all of them the last identity's, its mean is everybody's partner."""
    arguments, _ = sample(*CASES["many"])
    values = []
    for shuffle in (np.zeros(K), np.full(K, 1 - 2**-24), np.linspace(0.1, 0.9, K)):
        value, _ = found(arguments, *CASES["many"], 0.5, shuffle.astype(np.float32))
        np.testing.assert_allclose(value, slow_term(*arguments, *CASES["many"], shuffle), atol=1e-6)
        values.append(float(value))
    assert len(set(values)) == 3
