"""Deformable convolutions on CPUs: by tiles of locations, with own gradients.

All samples of a tile [locations, K * C] are taken, then multiplied by the kernel: they stay in the
cache. The backward pass takes them again, so that memory grows with the maps, not with nine times
the maps.
"""

from __future__ import annotations

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
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Samples

TILE = 256  # locations, at most
PIXELS = 2**18  # numbers of each tap's samples in a tile, at most: the caches hold no more
LANES = 16  # of a vector register
# Of the four corners of all samples: weights and rows of the table.
Weights = Float[Array, "4 ..."]
Rows = Int[Array, "4 ..."]


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "K C F"], samples: Samples
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel, in float32."""
    (taps, channels, features), places = kernel.shape, samples.weights.shape[1:-1]
    weights, rows = (x.reshape(4, -1, taps) for x in (samples.weights, samples.rows(maps)))
    out = _by_tiles(maps.reshape(-1, channels), kernel.reshape(-1, features), weights, rows)
    return out.reshape(*places, features)


@jax.custom_vjp
def _by_tiles(
    table: Float[Array, "R C"], kernel: Float[Array, "N F"], weights: Weights, rows: Rows
) -> Float[Array, "M F"]:
    """Samples all taps of a tile, then multiplies."""
    locations, taps = rows.shape[1:]
    size = min(TILE, PIXELS // table.shape[1], locations)
    corners = [x.reshape(4, -1) for x in (weights, rows)]

    def tile(out: Array, start: Array) -> tuple[Array, None]:
        part = [lax.dynamic_slice_in_dim(x, start * taps, size * taps, axis=1) for x in corners]
        samples = _behind_branch(_sample, table, *part).astype(table.dtype)
        product = matmul(samples.reshape(size, -1), kernel)
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=0), None

    # The last tile may begin within the one before it: no need to cut anything off, which copies.
    starts = jnp.minimum(jnp.arange(0, locations, size), locations - size)
    return lax.scan(tile, jnp.zeros((locations, kernel.shape[-1])), starts)[0]


def _by_tiles_bwd(residuals: tuple[Any, ...], d_out: Float[Array, "M F"]) -> tuple[Any, ...]:
    table, kernel, weights, rows = residuals
    (locations, features), taps, transposed_kernel = d_out.shape, rows.shape[-1], kernel.T
    size = min(TILE, PIXELS // table.shape[1], locations)

    def split(x: Array) -> Array:
        """[n, M, k] -> [tiles, n, size * k], with zeros after the last location."""
        x = jnp.pad(x, [(0, 0), (0, -locations % size), (0, 0)])
        return x.reshape(len(x), -1, size * x.shape[-1]).swapaxes(0, 1)

    def tile(sums: tuple[Array, Array], tile: tuple[Any, ...]) -> tuple[Any, Weights]:
        d_table, d_kernel = sums
        weights, rows, d_out, transposed = tile
        samples = _behind_branch(_sample, table, weights, rows).astype(table.dtype)
        d_kernel += matmul(transposed, samples.reshape(size, -1))
        d_samples = _behind_branch(matmul, d_out, transposed_kernel).reshape(-1, table.shape[-1])
        # Behind a barrier: XLA would store the corners, for `samples` and this to share.
        d_weights = _corner_products(table, lax.optimization_barrier(rows), d_samples)

        def add_corner(d_table: Array, corner: tuple[Array, Array]) -> tuple[Array, None]:
            weights, rows = corner
            return d_table.at[rows].add(weights[:, None] * d_samples, **IN_BOUNDS), None

        return (lax.scan(add_corner, d_table, (weights, rows))[0], d_kernel), d_weights

    d_out_tiles = split(d_out[None]).reshape(-1, size, features)
    # The transpose in one go: XLA's matmul on CPUs is slow when its left side is transposed.
    tiles = split(weights), split(rows), d_out_tiles, d_out_tiles.swapaxes(1, 2)
    sums = jnp.zeros(table.shape), jnp.zeros(kernel.T.shape)
    (d_table, d_kernel), d_weights = lax.scan(tile, sums, tiles)
    d_weights = d_weights.swapaxes(0, 1).reshape(4, -1, taps)[:, :locations]
    return d_table.astype(table.dtype), d_kernel.T.astype(kernel.dtype), d_weights, None


_by_tiles.defvjp(lambda *args: (_by_tiles(*args), args), _by_tiles_bwd)


def _behind_branch(function: Callable[..., Array], *args: Any) -> Array:
    """The function's result, which XLA must not fuse with what comes next: a branch is a border.

    What comes next sees the samples in another shape. Fused with it, sampling does not run along
    the channels in vector registers and takes ten times as long.
    """
    result = jax.eval_shape(function, *args)
    always = args[-1].ravel()[0] > -jnp.inf
    return lax.cond(always, function, lambda *_: jnp.zeros(result.shape, result.dtype), *args)


def _sample(table: Float[Array, "R C"], weights: Weights, rows: Rows) -> Float[Array, "M C"]:
    """Weighted sum of the four corners, in float32."""
    corners = zip(weights, rows, strict=True)
    total: Any = sum(weight[:, None] * table.at[row].get(**IN_BOUNDS) for weight, row in corners)
    return total


def _corner_products(
    table: Float[Array, "R C"], rows: Rows, values: Float[Array, "M C"]
) -> Float[Array, "4 M"]:
    """Inner product of every value with its four corners, in float32.

    One reduction of four operands, so that neither the corners nor the products are stored; and,
    as no compiler reorders a sum of floats, in as many partial sums as a register has lanes.
    """
    lanes = math.gcd(values.shape[1], LANES)
    products = [values.astype(jnp.float32) * table.at[row].get(**IN_BOUNDS) for row in rows]
    products = [p.reshape(len(p), -1, lanes) for p in products]
    zeros = [np.float32(0)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,))
    return jnp.stack([each.sum(axis=-1) for each in sums])
