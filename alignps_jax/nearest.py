"""Search among many embeddings: the most similar ones of each query, exactly."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.types import AnyArray, UserError

# Few enough rows that their similarities stay in a CPU's cache, enough to keep a GPU busy.
CHUNK = 16384


@struct.dataclass
class Neighbors:
    """The k most similar embeddings of each of Q queries, most similar first.

    `index` are rows of the gallery.
    """

    index: Int[Array, "Q k"]
    similarity: Float[Array, "Q k"]


def top_k(
    queries: Float[AnyArray, "Q _D"],
    gallery: Float[AnyArray, "N _D"],
    k: int,
    chunk: int = CHUNK,
    among: Bool[AnyArray, "N"] | None = None,
) -> Neighbors:
    """The k rows of `gallery` with the largest inner product with each query, in float32.

    Of equal similarities the one of the lower index comes first. Nothing of the size of the
    gallery or of Q x N is ever made, so this needs little more memory than the gallery itself;
    give a large one as a `jax.Array`, or it is copied to the device first. One program is compiled
    per shape.

    Args:
      queries: as many as one likes; embeddings of length one make similarities cosines.
      gallery: the same, in any number.
      k: 1 to N.
      chunk: rows of the gallery at a time, a power of two; it decides on speed only.
      among: rows that count; default: all. What is missing of k then has similarity -inf.

    Raises:
      UserError: the arrays are no matrices of equal width, or k is out of range.
    """
    shapes = jnp.shape(queries), jnp.shape(gallery)
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise UserError(
            f"gallery search: found arrays of shapes {shapes[0]} and {shapes[1]}, expected "
            "(queries, D) and (gallery, D)"
        )
    if not 1 <= k <= shapes[1][0]:
        raise UserError(
            f"gallery search: found k = {k}, expected 1 to {shapes[1][0]}, the size of the gallery"
        )
    chunk = min(shapes[1][0], max(chunk, power_of_two_from(k)))
    return _top_k(queries, gallery, among, k, chunk)


@partial(jax.jit, static_argnames=("k", "chunk"))
def _top_k(
    queries: Float[AnyArray, "Q _D"],
    gallery: Float[AnyArray, "N _D"],
    among: Bool[AnyArray, "N"] | None,
    k: int,
    chunk: int,
) -> Neighbors:
    """`top_k`, going through the gallery `chunk` rows at a time, the last of which may overlap."""
    count = len(gallery)

    def search(turn: Int[Array, ""], best: Neighbors) -> Neighbors:
        start = jnp.minimum(turn * chunk, count - chunk)
        part = lax.dynamic_slice_in_dim(gallery, start, chunk)
        # Full precision: a GPU's default for matrix products is not exact.
        similarity = jnp.matmul(
            queries, part.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        is_new = jnp.arange(chunk) + start >= turn * chunk
        if among is not None:
            is_new = is_new & lax.dynamic_slice_in_dim(among, start, chunk)
        similarity = jnp.where(is_new, similarity, -jnp.inf)
        index, similarity = jax.vmap(partial(_candidates, k=k))(similarity)
        # Lower indices come first on either side, and `lax.top_k` prefers what comes first.
        index = jnp.concatenate([best.index, index + start], axis=1)
        similarity, place = lax.top_k(jnp.concatenate([best.similarity, similarity], axis=1), k)
        return Neighbors(jnp.take_along_axis(index, place, axis=1), similarity)

    nothing = Neighbors(
        index=jnp.zeros((len(queries), k), jnp.int32),
        similarity=jnp.full((len(queries), k), -jnp.inf, jnp.float32),
    )
    return lax.fori_loop(0, -(-count // chunk), search, nothing)


def _candidates(similarity: Float[Array, "C"], k: int) -> tuple[Int[Array, "c"], Float[Array, "c"]]:
    """Places, ascending, among which are the k best, and what stands there.

    The k best lie in the k groups of neighboring places with the largest maxima (the first ones
    of equals): each of those holds an element that beats whatever another group has. Maxima cost
    next to nothing, where sorting all places would cost more than the matrix product.
    """
    group = _group_size(len(similarity), k)
    groups = similarity.reshape(-1, group)
    chosen = jnp.sort(lax.top_k(groups.max(axis=1), min(k, len(groups)))[1])
    index = chosen[:, None] * group + jnp.arange(group)
    return index.ravel(), groups[chosen].ravel()


def _group_size(places: int, k: int) -> int:
    """About sqrt(places / k), which balances maxima and candidates; a divisor of `places`."""
    return math.gcd(places, power_of_two_from(math.isqrt(places // k)))


def power_of_two_from(number: int) -> int:
    """The smallest power of two that is at least `number`, itself at least 1."""
    return 1 << max(0, number - 1).bit_length()
