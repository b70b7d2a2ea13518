"""Deformable convolutions on CPUs: by tiles of locations, with own gradients.

All samples of a tile [locations, 9 * C] are taken, then multiplied by the kernel: they stay in the
cache. The backward pass takes them again, so that memory grows with the maps, not with nine times
the maps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Samples

TILE = 256  # locations, at most
LANES = 16  # of a vector register
# Of the N pixels of a tile's samples: weights and rows of the table.
Weights = Float[Array, "*tiles N M"]
Rows = Int[Array, "*tiles N M"]


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "9 C F"], samples: Samples
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel, in float32."""
    taps, channels, features = kernel.shape
    rows, weights = (x.reshape(4, -1, taps) for x in samples.corners(maps))
    table = maps.reshape(-1, channels)
    if channels >= 8 * features:
        # Projected for all taps, the map is hardly larger; a location has one sample, of 36 pixels.
        table = matmul(table, kernel.swapaxes(0, 1).reshape(channels, -1)).reshape(-1, features)
        rows = rows * taps + jnp.arange(taps)
        weights, rows = (x.swapaxes(1, 2).reshape(4 * taps, -1, 1) for x in (weights, rows))
        kernel = jnp.eye(features)
    # Tiles of locations; small ones if there are few, with zeros after the last location.
    count = weights.shape[1]
    size = min(TILE, -(-count // 9))
    padding = (0, 0), (0, -count % size), (0, 0)
    tiles = (jnp.pad(x, padding).reshape(len(x), -1, size * x.shape[2]) for x in (weights, rows))
    out = _by_tiles(table, kernel.reshape(-1, features), *(x.swapaxes(0, 1) for x in tiles))
    return out.reshape(-1, features)[:count].reshape(*samples.y.shape[1:-1], features)


@jax.custom_vjp
def _by_tiles(
    table: Float[Array, "R C"], kernel: Float[Array, "KC F"], weights: Weights, rows: Rows
) -> Float[Array, "tiles size F"]:
    """Samples all taps of a tile, then multiplies."""

    def tile(corners: tuple[Weights, Rows]) -> Float[Array, "size F"]:
        return matmul(_samples(table, *corners).reshape(-1, len(kernel)), kernel)

    return lax.map(tile, (weights, rows))


def _by_tiles_bwd(residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    table, kernel, weights, rows = residuals
    transposed_kernel = kernel.T

    def tile(sums: tuple[Array, Array], tile: tuple[Any, ...]) -> tuple[Any, Weights]:
        d_table, d_kernel = sums
        weights, rows, d_out, transposed = tile
        d_kernel += matmul(transposed, _samples(table, weights, rows).reshape(-1, len(kernel)))
        d_samples = matmul(d_out, transposed_kernel).reshape(-1, table.shape[-1])
        # Behind a barrier: XLA would store the pixels, for `_samples` and this to share.
        d_weights = _products(table, lax.optimization_barrier(rows), d_samples)

        def add_pixels(d_table: Array, corner: tuple[Array, Array]) -> tuple[Array, None]:
            weights, rows = corner
            return d_table.at[rows].add(weights[:, None] * d_samples, **IN_BOUNDS), None

        return (lax.scan(add_pixels, d_table, (weights, rows))[0], d_kernel), d_weights

    # The transpose in one go: XLA's matmul on CPUs is slow when its left side is transposed.
    tiles = weights, rows, d_out, d_out.swapaxes(1, 2)
    sums = jnp.zeros(table.shape), jnp.zeros(kernel.T.shape)
    (d_table, d_kernel), d_weights = lax.scan(tile, sums, tiles)
    return d_table.astype(table.dtype), d_kernel.T.astype(kernel.dtype), d_weights, None


_by_tiles.defvjp(lambda *args: (_by_tiles(*args), args), _by_tiles_bwd)


def _samples(table: Float[Array, "R C"], weights: Weights, rows: Rows) -> Float[Array, "M C"]:
    """Weighted sum of the pixels of every sample.

    In a branch, which XLA does not fuse with what comes next. That sees the samples in another
    shape: sampling would not run along the channels in vector registers, but ten times as long.
    """

    def sample() -> Array:
        pixels = [table.at[row].get(**IN_BOUNDS) for row in rows]
        total: Any = sum(w[:, None] * p for w, p in zip(weights, pixels, strict=True))
        return total.astype(table.dtype)

    never = jnp.zeros((rows.shape[1], table.shape[1]), table.dtype)
    return lax.cond(rows[0, 0] >= 0, sample, lambda: never)


def _products(table: Float[Array, "R C"], rows: Rows, values: Float[Array, "M C"]) -> Weights:
    """Inner product of every value with each pixel of its sample, in float32.

    One reduction of all operands, so that neither the pixels nor the products are stored; and,
    as no compiler reorders a sum of floats, in as many partial sums as a register has lanes.
    """
    lanes = np.gcd(values.shape[1], LANES)
    products = [values.astype(jnp.float32) * table.at[row].get(**IN_BOUNDS) for row in rows]
    products = [p.reshape(len(p), -1, lanes) for p in products]
    zeros = [np.float32(0)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(map(lax.add, a, b)), (1,))
    return jnp.stack([each.sum(axis=-1) for each in sums])
