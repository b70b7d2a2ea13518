"""How a deformable convolution samples and multiplies, and its gradients."""

from __future__ import annotations

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


# `_neighbours` clips, so that gathers and scatters need not.
_IN_BOUNDS = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def _corners(
    y: Float[Array, "B h w K"], x: Float[Array, "B h w K"], size: tuple[int, int]
) -> tuple[list[Int[Array, "M K"]], list[Float[Array, "M K"]]]:
    """Rows of the table [B*H*W, C] that hold the four pixels around each position, and weights.

    The weights are bilinear, 0 for pixels outside the image, NaN where a coordinate is.
    """
    image = np.arange(len(y), dtype=np.int32)[:, None, None, None] * size[0]
    corners = [
        ((image + row) * size[1] + column, row_weight * column_weight)
        for row, row_weight in _neighbours(y, size[0])
        for column, column_weight in _neighbours(x, size[1])
    ]
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), corners)
    return [row for row, _ in flat], [weight for _, weight in flat]


def _neighbours(
    position: Float[Array, "B h w K"], size: int
) -> list[tuple[Int[Array, "B h w K"], Float[Array, "B h w K"]]]:
    """The pixel at or before and that after each position, along one axis, with linear weights.

    Instead of a pixel outside comes the nearest one inside, with weight 0.
    """
    # Far outside nothing changes any more; clipping keeps the conversion to integers sane.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    fraction = position - first
    return [
        (
            jnp.clip(pixel.astype(jnp.int32), 0, size - 1),
            jnp.where((pixel < 0) | (pixel >= size), 0.0, weight),
        )
        for pixel, weight in ((first, 1 - fraction), (first + 1, fraction))
    ]


@jax.custom_vjp
def _deform_conv(
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """Sum over the taps of sample(map) @ kernel; M are the locations of the output."""
    args = table, weights, kernel.astype(table.dtype), rows
    out = (
        _by_taps(*args) if _project_first(table, kernel, rows) else _run_by_tiles(_by_tiles, *args)
    )
    return out.astype(table.dtype)


def _deform_conv_bwd(residuals, d_out):
    """Cotangents of table, weights and kernel from that of the output [M, F]."""
    table, weights, kernel, rows = residuals
    args = table, weights, kernel.astype(table.dtype), rows
    gradients = (
        _by_taps_bwd(*args, d_out)
        if _project_first(table, kernel, rows)
        else _run_by_tiles(_by_tiles_bwd, *args, d_out)
    )
    d_table, d_weights, d_kernel = gradients
    return d_table.astype(table.dtype), d_weights, d_kernel.astype(kernel.dtype), None


def _project_first(table: Array, kernel: Array, rows: Rows) -> bool:
    """Whether to go by taps: no more rows are multiplied and far fewer channels sampled."""
    _, channels, features = kernel.shape
    return len(table) <= len(rows[0]) and channels >= 4 * features


def _by_taps(
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """`_deform_conv`, one tap of all locations at a time: the map is projected, then sampled."""

    def add_tap(out, tap):
        weights, kernel, rows = tap
        return out + _sample(table @ kernel, rows, weights), None

    zeros = jnp.zeros_like(table, dtype=jnp.float32, shape=(len(rows[0]), kernel.shape[-1]))
    taps = _transposed(weights), kernel, _transposed(rows)
    return lax.scan(add_tap, zeros, taps)[0]


def _by_taps_bwd(
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
        d_weights = _corner_products(projected, rows, d_out)
        d_projected = jnp.zeros_like(projected, dtype=jnp.float32)
        d_projected = _scatter(d_projected, rows, weights, d_out).astype(table.dtype)
        d_kernel = matmul(transposed, d_projected)
        return d_table + matmul(d_projected, kernel.T), (d_weights, d_kernel)

    zeros = jnp.zeros_like(table, dtype=jnp.float32)
    taps = _transposed(weights), kernel, _transposed(rows)
    d_table, (d_weights, d_kernel) = lax.scan(add_tap, zeros, taps)
    return d_table, _transposed(d_weights), d_kernel


def _run_by_tiles(by_tiles: Callable[..., Any], *args: Any) -> Any:
    """Calls `by_tiles` with the size and the `store` that suit the platform.

    On CPUs a tile stays in the cache. Elsewhere its samples are about as large as the map.
    """
    locations, taps = args[1][0].shape
    large = -(-locations // taps)
    return lax.platform_dependent(
        *args,
        cpu=functools.partial(by_tiles, size=min(256, large), store=_behind_branch),
        default=functools.partial(by_tiles, size=large, store=_call),
    )


def _by_tiles(
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    *,
    size: int,
    store: Callable[..., Array],
) -> Float[Array, "M F"]:
    """`_deform_conv`, all taps of `size` locations at a time; `store` holds what they sample."""
    locations, taps = rows[0].shape
    features = kernel.shape[-1]
    size = min(size, locations)
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
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "M F"],
    *,
    size: int,
    store: Callable[..., Array],
) -> tuple[Float[Array, "R C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, all taps of `size` locations at a time."""
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
        d_weights = _corner_products(table, lax.optimization_barrier(rows), d_samples)
        return (_scatter(d_table, rows, weights, d_samples), d_kernel), d_weights

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


def _call(rows: Rows, function: Callable[..., Array], *args: Array) -> Array:
    return function(*args)


def _behind_branch(rows: Rows, function: Callable[..., Array], *args: Array) -> Array:
    """The function's result, which XLA must not fuse with what comes next: a branch is a border.

    What comes next sees the samples in another shape. Fused with it, sampling no longer runs along
    the channels in vector registers and takes ten times as long.
    """
    result = jax.eval_shape(function, *args)

    def never(*args: Array) -> Array:
        return jnp.zeros_like(args[0], dtype=result.dtype, shape=result.shape)

    return lax.cond(rows[0][0] >= 0, function, never, *args)


def _sample(table: Float[Array, "R C"], rows: Rows, weights: Weights) -> Float[Array, "M C"]:
    """Weighted sum of the four corners, in float32."""
    return sum(
        w[:, None] * table.at[r].get(**_IN_BOUNDS) for r, w in zip(rows, weights, strict=True)
    )


def _scatter(
    table: Float[Array, "R C"],
    rows: Rows,
    weights: Weights,
    values: Float[Array, "M C"],
) -> Float[Array, "R C"]:
    """The transpose of `_sample`, added to `table`."""

    def add_corner(table, corner):
        rows, weights = corner
        return table.at[rows].add(weights[:, None] * values, **_IN_BOUNDS), None

    return lax.scan(add_corner, table, (jnp.stack(rows), jnp.stack(weights)))[0]


def _corner_products(
    table: Float[Array, "R C"], rows: Rows, values: Float[Array, "M C"]
) -> tuple[Float[Array, "M"], ...]:
    """Inner product of every value with its four corners, in float32.

    One reduction of four operands, so that neither the corners nor the products are stored; and,
    as no compiler reorders a sum of floats, in `lanes` sums that vector registers hold.
    """
    values = values.astype(jnp.float32)
    locations, channels = values.shape
    lanes = math.gcd(channels, 16)
    products = [values * table.at[r].get(**_IN_BOUNDS) for r in rows]
    products = [p.reshape(locations, channels // lanes, lanes) for p in products]
    zeros = [np.float32(0)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,))
    return tuple(each.sum(axis=-1) for each in sums)
