"""Deformable sampling and multiplication by gathers and scatters, and its gradients.

The map is a table of rows [B*H*W, C], so every read and write of a corner is contiguous. There are
three orders:

- by tiles: some locations of the output at a time, all their samples [locations, 9 * C] times the
  kernel. What a tile reads and writes stays in the cache.
- by taps: one tap of all locations at a time. Sampling is linear and acts per location, so it
  commutes with the projection of a tap's C channels to F: the map is projected, then sampled,
  which pays where C is larger than F.
- by groups of taps: the same for several taps at once, on GPUs, where each tap would be launches of
  its own. It takes as much more memory.

In all of them the backward pass samples again instead of keeping the samples: memory grows with the
maps, not with nine times the maps. Only the positions and weights of all samples are there at
once; JAX differentiates those.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.nn.convolution import matmul

# Of the four pixels around every sample: rows of the table, and weights. [M, K], or part of it.
Rows = tuple[Int[Array, "..."], ...]
Weights = tuple[Float[Array, "..."], ...]
# The same of one tap or group of taps, where a loop over taps may have stacked them.
RowsOfTap = Rows | Int[Array, "_ M"]
WeightsOfTap = Weights | Float[Array, "_ M"]
# The rows are those of pixels inside the map, so that gathers and scatters need not clip.
IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order a deformable convolution samples and multiplies.

    Attributes:
      by_taps: project the map for one tap, then sample, one tap after another; else sample all
        taps of `tile` locations, then multiply.
      tile: how many locations at a time, where not by taps.
      fenced: keep XLA from fusing a tile's samples with what comes next (see `_behind_branch`).
      lanes: into how many partial sums an inner product over the channels is split at most.
      group: how many taps are projected, sampled and scattered to at once, where by taps.
      at_once: scatter to all corners at once, not to one after another.
    """

    by_taps: bool
    tile: int
    fenced: bool = False
    lanes: int = 1
    group: int = 1
    at_once: bool = False


def forward(order: Order, *args: Any) -> Array:
    if not order.by_taps:
        return _by_tiles(order, *args)
    return _by_taps(*args) if order.group == 1 else _by_groups(order, *args)


def backward(order: Order, *args: Any) -> tuple[Any, ...]:
    if not order.by_taps:
        return _by_tiles_bwd(order, *args)
    return _by_taps_bwd(order, *args) if order.group == 1 else _by_groups_bwd(order, *args)


def _by_taps(
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """`sample_and_multiply` by taps: the map is projected for all locations, then sampled."""

    def add_tap(out, tap):
        weights, kernel, rows = tap
        return out + _sample(table @ kernel, rows, weights), None

    zeros = jnp.zeros_like(table, dtype=jnp.float32, shape=(len(rows[0]), kernel.shape[-1]))
    taps = _transposed(weights), kernel, _transposed(rows)
    return lax.scan(add_tap, zeros, taps)[0]


def _by_taps_bwd(
    order: Order,
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "M F"],
) -> tuple[Float[Array, "R C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, one tap of all locations at a time."""
    # Once for all taps: XLA's matrix product on CPU is slow when its left side is transposed.
    transposed = table.T

    def add_tap(d_table, tap):
        weights, kernel, rows = tap
        projected = table @ kernel
        d_weights = _corner_products(projected, rows, d_out, order.lanes)
        d_projected = jnp.zeros_like(projected, dtype=jnp.float32)
        d_projected = scatter(d_projected, rows, weights, d_out, order.at_once)
        d_projected = d_projected.astype(table.dtype)
        d_kernel = matmul(transposed, d_projected)
        return d_table + matmul(d_projected, kernel.T), (d_weights, d_kernel)

    zeros = jnp.zeros_like(table, dtype=jnp.float32)
    taps = _transposed(weights), kernel, _transposed(rows)
    d_table, (d_weights, d_kernel) = lax.scan(add_tap, zeros, taps)
    return d_table, _transposed(d_weights), d_kernel


def _by_groups(
    order: Order,
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """`_by_taps`, `order.group` taps at a time."""
    features = kernel.shape[-1]

    def add_group(out, group):
        weights, kernel, rows = group
        projected = (table @ kernel).reshape(-1, features)
        return out + _sample(projected, rows, weights), None

    zeros = jnp.zeros_like(table, dtype=jnp.float32, shape=(len(rows[0]), features))
    return lax.scan(add_group, zeros, _groups(order.group, weights, kernel, rows))[0]


def _by_groups_bwd(
    order: Order,
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "M F"],
) -> tuple[Float[Array, "R C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, `order.group` taps at a time."""
    taps, channels, features = kernel.shape

    def add_group(d_table, group):
        weights, kernel, rows = group
        projected = (table @ kernel).reshape(-1, features)
        d_weights = jnp.stack(_corner_products(projected, rows, d_out, order.lanes))
        d_projected = jnp.zeros_like(projected, dtype=jnp.float32)
        d_projected = scatter(d_projected, rows, weights, d_out, order.at_once)
        d_projected = d_projected.astype(table.dtype).reshape(len(table), -1)
        d_kernel = matmul(table.T, d_projected)
        return d_table + matmul(d_projected, kernel.T), (d_weights, d_kernel)

    zeros = jnp.zeros_like(table, dtype=jnp.float32)
    groups = _groups(order.group, weights, kernel, rows)
    d_table, (d_weights, d_kernel) = lax.scan(add_group, zeros, groups)
    d_kernel = d_kernel.reshape(-1, channels, order.group, features).swapaxes(1, 2)
    d_weights = d_weights.reshape(taps, 4, -1).transpose(1, 2, 0)
    return d_table, tuple(d_weights), d_kernel.reshape(kernel.shape)


def _groups(size: int, weights: Weights, kernel: Float[Array, "K C F"], rows: Rows) -> Any:
    """Weights [G, size * 4, M], kernel [G, C, size * F] and rows as the weights, of G groups.

    A group's kernel projects the table to [R, size * F], which is a table [R * size, F] as well.
    """
    taps, channels, features = kernel.shape
    kernel = kernel.reshape(-1, size, channels, features).swapaxes(1, 2)

    def pack(corners: tuple[Array, ...]) -> Array:
        return jnp.stack(corners).transpose(2, 0, 1)

    packed = pack(rows) * size + np.arange(taps, dtype=np.int32)[:, None, None] % size
    packed, packed_weights = (
        x.reshape(taps // size, size * 4, -1) for x in (packed, pack(weights))
    )
    return packed_weights, kernel.reshape(-1, channels, size * features), packed


def _by_tiles(
    order: Order,
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """`sample_and_multiply`, all taps of `order.tile` locations at a time."""
    locations, taps = rows[0].shape
    features = kernel.shape[-1]
    size, store = min(order.tile, locations), _store(order)
    kernel = kernel.reshape(-1, features)
    corners = jax.tree.map(jnp.ravel, (weights, rows))

    def tile(out, start):
        part = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start * taps, slice_size=size * taps
        )
        weights, rows = jax.tree.map(part, corners)
        samples = store(rows, _sample, table, rows, weights).astype(table.dtype)
        product = matmul(samples.reshape(size, -1), kernel)
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=0), None

    # The last tile may begin within the one before it: no need to cut anything off, which copies.
    starts = np.minimum(np.arange(0, locations, size), locations - size)
    zeros = jnp.zeros_like(table, dtype=jnp.float32, shape=(locations, features))
    return lax.scan(tile, zeros, starts)[0]


def _by_tiles_bwd(
    order: Order,
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "M F"],
) -> tuple[Float[Array, "R C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, all taps of `order.tile` locations at a time."""
    size, store = order.tile, _store(order)
    taps, channels, features = kernel.shape
    transposed_kernel = kernel.reshape(-1, features).T
    d_out = _split(d_out, size).reshape(-1, size, features)

    def tile(sums, tile):
        d_table, d_kernel = sums
        weights, rows, d_out, transposed = tile
        samples = store(rows, _sample, table, rows, weights).astype(table.dtype)
        d_kernel += matmul(transposed, samples.reshape(size, -1))
        d_samples = store(rows, matmul, d_out, transposed_kernel).reshape(-1, channels)
        # Behind a barrier: XLA would store the corners, for `samples` and this to share.
        d_weights = _corner_products(table, lax.optimization_barrier(rows), d_samples, order.lanes)
        d_table = scatter(d_table, rows, weights, d_samples, order.at_once)
        return (d_table, d_kernel), d_weights

    zeros = functools.partial(jnp.zeros_like, table, dtype=jnp.float32)
    # The transpose in one go: XLA's matrix product on CPU is slow when its left side is transposed.
    tiles = *_split((weights, rows), size), d_out, d_out.swapaxes(1, 2)
    sums = zeros(), zeros(shape=(features, taps * channels))
    (d_table, d_kernel), d_weights = lax.scan(tile, sums, tiles)
    d_weights = jax.tree.map(lambda d: d.reshape(-1, taps)[: len(rows[0])], d_weights)
    return d_table, d_weights, d_kernel.T.reshape(kernel.shape)


def _split(tree: Any, size: int) -> Any:
    """Each [M, n] -> [tiles, size * n], with zeros after the last location."""

    def split(x: Array) -> Array:
        return jnp.pad(x, [(0, -len(x) % size), (0, 0)]).reshape(-1, size * x.shape[1])

    return jax.tree.map(split, tree)


def _transposed(corners: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(corner.T for corner in corners)


def _store(order: Order) -> Callable[..., Array]:
    return _behind_branch if order.fenced else _call


def _call(rows: Rows, function: Callable[..., Array], *args: Any) -> Array:
    return function(*args)


def _behind_branch(rows: Rows, function: Callable[..., Array], *args: Any) -> Array:
    """The function's result, which XLA must not fuse with what comes next: a branch is a border.

    What comes next sees the samples in another shape. Fused with it, sampling no longer runs along
    the channels in vector registers and takes ten times as long.
    """
    result = jax.eval_shape(function, *args)

    def never(*args: Any) -> Array:
        return jnp.zeros_like(args[0], dtype=result.dtype, shape=result.shape)

    return lax.cond(rows[0][0] >= 0, function, never, *args)


def _sample(
    table: Float[Array, "R C"], rows: RowsOfTap, weights: WeightsOfTap
) -> Float[Array, "M C"]:
    """Weighted sum of the four corners, in float32."""
    total: Any = sum(
        w[:, None] * table.at[r].get(**IN_BOUNDS) for r, w in zip(rows, weights, strict=True)
    )
    return total


def scatter(
    table: Float[Array, "R C"],
    rows: RowsOfTap,
    weights: WeightsOfTap,
    values: Float[Array, "M C"],
    at_once: bool,
) -> Float[Array, "R C"]:
    """The transpose of `_sample`, added to `table`."""

    def add_corner(table, corner):
        rows, weights = corner
        return table.at[rows].add(weights[:, None] * values, **IN_BOUNDS), None

    if at_once:
        values = jnp.stack(weights)[..., None] * values
        return table.at[jnp.stack(rows)].add(values, **IN_BOUNDS)
    return lax.scan(add_corner, table, (jnp.stack(rows), jnp.stack(weights)))[0]


def _corner_products(
    table: Float[Array, "R C"], rows: RowsOfTap, values: Float[Array, "M C"], lanes: int
) -> tuple[Float[Array, "M"], ...]:
    """Inner product of every value with its four corners, in float32.

    One reduction of four operands, so that neither the corners nor the products are stored; and,
    as no compiler reorders a sum of floats, in up to `lanes` sums that vector registers hold.
    """
    values = values.astype(jnp.float32)
    if lanes == 1:
        return tuple(jnp.sum(values * table.at[r].get(**IN_BOUNDS), axis=-1) for r in rows)
    locations, channels = values.shape
    lanes = math.gcd(channels, lanes)
    products = [values * table.at[r].get(**IN_BOUNDS) for r in rows]
    products = [p.reshape(locations, channels // lanes, lanes) for p in products]
    zeros = [np.float32(0)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,))
    return tuple(each.sum(axis=-1) for each in sums)
