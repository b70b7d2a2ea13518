"""The search among embeddings against sorting everything."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax import nearest as gallery
from alignps_jax.types import UserError


def sorted_all(queries, embeddings, k):
    """Indices and similarities of a stable sort, in float64."""
    similarity = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return index, np.take_along_axis(similarity, index, axis=1)


def whole_numbers(seed, *shape):
    """Few different ones, so that products are exact and many of them equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "k"),
    [
        (1, 1),
        (5, 5),
        (32, 3),  # one chunk, which is full
        (33, 3),  # and one more
        (63, 32),
        (96, 3),  # three full ones
        (97, 1),
        (100, 10),
        (100, 33),  # more than a chunk
        (100, 100),
        (131, 70),
    ],
)
def test_equals_sorting_everything_ties_included(count, k):
    queries, embeddings = whole_numbers(count, 4, 3), whole_numbers(k, count, 3)
    found = gallery.top_k(queries, embeddings, k, chunk=32)
    index, similarity = sorted_all(queries, embeddings, k)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.similarity, similarity)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_rows_that_do_not_count_are_not_found(share):
    queries, embeddings = whole_numbers(1, 4, 3), whole_numbers(2, 97, 3)
    among = np.random.default_rng(3).random(97) < share
    found = gallery.top_k(queries, embeddings, 20, chunk=32, among=among)
    rows = np.flatnonzero(among)
    index, similarity = sorted_all(queries, embeddings[rows], 20)
    count = min(20, len(rows))
    np.testing.assert_array_equal(found.index[:, :count], rows[index])
    np.testing.assert_array_equal(found.similarity[:, :count], similarity)
    assert np.all(found.similarity[:, count:] == -np.inf)


def test_more_than_a_chunk_of_real_embeddings():
    rng = np.random.default_rng(0)
    count = 2 * gallery.CHUNK + 77
    embeddings = rng.normal(size=(count, 16)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    queries = embeddings[[count - 1, 5, gallery.CHUNK]]  # each is its own best match
    found = gallery.top_k(queries, embeddings, 9)
    index, similarity = sorted_all(queries, embeddings, 9)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    assert found.index[:, 0].tolist() == [count - 1, 5, gallery.CHUNK]


def test_all_equal_gives_the_first():
    found = gallery.top_k(np.ones((2, 3)), np.ones((45, 3)), 20, chunk=16)
    np.testing.assert_array_equal(found.index, np.tile(np.arange(20), (2, 1)))


def test_nothing_similar_is_still_ranked():
    """Negative similarities come before what is searched twice in the last chunk."""
    embeddings = -np.arange(1, 14, dtype=np.float32)[:, None]
    found = gallery.top_k(np.ones((1, 1), np.float32), embeddings, 13, chunk=8)
    np.testing.assert_array_equal(found.index[0], np.arange(13))


def test_without_queries():
    found = gallery.top_k(np.zeros((0, 3)), np.ones((5, 3)), 2)
    assert found.index.shape == found.similarity.shape == (0, 2)


def test_needs_little_more_than_the_gallery():
    count, dim = 40 * gallery.CHUNK + 3, 64
    arguments = (
        jax.ShapeDtypeStruct((10, dim), jnp.float32),
        jax.ShapeDtypeStruct((count, dim), jnp.float32),
    )
    compiled = jax.jit(partial(gallery.top_k, k=10)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.1 * count * dim * 4


@pytest.mark.parametrize(
    ("queries", "embeddings", "k", "message"),
    [
        ((2, 3), (5, 3), 6, "found k = 6, expected 1 to 5"),
        ((2, 3), (5, 3), 0, "found k = 0, expected 1 to 5"),
        ((2, 3), (0, 3), 1, "found k = 1, expected 1 to 0"),
        ((2, 3), (5, 4), 1, r"shapes \(2, 3\) and \(5, 4\)"),
        ((3,), (5, 3), 1, r"shapes \(3,\) and \(5, 3\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input(queries, embeddings, k, message):
    with pytest.raises(UserError, match=message):
        gallery.top_k(np.zeros(queries), np.zeros(embeddings), k)
