"""Deformable convolutions on TPUs: matmuls with windows of the map in place of gathers.

A TPU reads a row of a table in several cycles and adds to one in tens, one row after another, but
multiplies 65,000 pairs of numbers in one. So the map is cut into blocks of 8 x 16 locations, which
sample their window, 24 x 32 pixels around them, by a matrix of the weights of its pixels. That
holds all samples with offsets of -7 to less than 7 pixels; locations with others are gathered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Num

from alignps_jax.nn import deform_gathers
from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Samples

BAND = 96  # blocks at a time, at most: their windows stay in the vector memory
FEW = 64  # if one location in this many has samples outside its window, all are gathered


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "9 C F"], samples: Samples
) -> Float[Array, "B H W F"]:
    """Sum over the taps of sample(map) @ kernel, in float32, at every pixel."""
    (batch, height, width, channels), (taps, _, features) = maps.shape, kernel.shape
    # XLA keeps the map of one image after an upsampling with one row where eight have room.
    maps = with_layout_constraint(maps, Layout((0, 1, 2, 3)))
    y, x = samples.y[:, None], samples.x
    in_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y = y + 8 - (jnp.arange(height) // 8 * 8)[:, None, None]
    x = x + 8 - (jnp.arange(width) // 16 * 16)[:, None]
    inside = (y >= 0) & (y < 24) & (x >= 0) & (x < 32)
    outside = (in_map & ~inside).any((0, 1, -1))
    far = jnp.cumsum(outside.ravel(), dtype=jnp.int32)
    most = -(-len(far) // FEW)
    rest = samples._replace(mask=jnp.where(outside[..., None], samples.mask, 0.0))
    zeros = jnp.zeros((batch, height, width, features))

    def few() -> Array:
        at = jnp.searchsorted(far, jnp.arange(1, most + 1), method="compare_all")
        corners = (corner.reshape(4, -1, taps) for corner in rest.corners(maps))
        rows, weights = (x.at[:, at].get(mode="fill", fill_value=0) for x in corners)
        found = maps.reshape(-1, channels).at[rows].get(**IN_BOUNDS) * weights[..., None]
        found = found.sum(0).astype(maps.dtype).reshape(most, -1)
        found = matmul(found, kernel.reshape(-1, features))
        return zeros.reshape(-1, features).at[at].add(found, mode="drop").reshape(zeros.shape)

    many = partial(deform_gathers.convolve, maps, kernel, rest, group=1)
    found = lax.switch(jnp.int32(far[-1] > 0) + (far[-1] > most), (lambda: zeros, few, many))
    weights = samples.corners(maps)[1]
    places = jnp.where(inside, (y // 8 * 4 + x // 8) * 64 + y % 8 * 8 + x % 8, -1)
    places = jnp.where(outside[..., None], -1, places).reshape(weights.shape)
    return found + _windows(maps, kernel, places, weights)


def _windows(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "9 C F"], *corners: Num[Array, "4 B H W 9"]
) -> Float[Array, "B H W F"]:
    """What is in the windows; some rows of blocks at a time."""
    (batch, height, width, channels), features = maps.shape, kernel.shape[-1]
    wide = -(-width // 16)
    bands = -(-height // (8 * max(1, BAND // wide)))
    band = -(-height // (8 * bands))
    high = bands * band
    edges = (0, 0), (0, high * 8 - height), (0, wide * 16 - width)

    def blocks(x: Num[Array, "4 B H W 9"]) -> Num[Array, "N 9 4 n 1 128"]:
        """Bands first, then taps; locations block by block."""
        x = jnp.pad(x, ((0, 0), *edges, (0, 0))).reshape(4, batch * bands, band, 8, wide, 16, -1)
        return x.transpose(1, 6, 0, 2, 4, 3, 5).reshape(batch * bands, -1, 4, band * wide, 1, 128)

    # The 8 x 8 squares of each band, with those of a row of blocks above and below it.
    squares = jnp.pad(maps, (*edges, (0, 0))).reshape(batch, high, 8, 2 * wide, 8, channels)
    squares = squares.swapaxes(2, 3)
    rows = jnp.arange(band)[:, None] + jnp.arange(-1, 2)
    if bands == 1:  # without a copy
        rows = jnp.clip(rows, 0, high - 1)
    else:
        around = jnp.arange(bands)[:, None] * band + jnp.arange(-1, band + 1)
        squares, rows = squares[:, jnp.clip(around, 0, high - 1)], rows + 1
    squares = squares.reshape(batch * bands, -1, 64, channels)
    # Which ones make the windows, 3 rows of 4; instead of one outside the map, one inside.
    columns = jnp.clip(2 * jnp.arange(wide)[:, None] + jnp.arange(-1, 3), 0, 2 * wide - 1)
    at = (rows[:, None, :, None] * (2 * wide) + columns[:, None]).ravel()

    def sample_band(squares: Array, *corners: Array) -> Float[Array, "n F 128"]:
        @jax.checkpoint  # the backward pass builds matrices and windows again
        def sample(kernel: Array, places: Array, weights: Array) -> Array:
            windows = (squares @ kernel).at[at].get(**IN_BOUNDS).reshape(-1, 24 * 32, features)
            # The weight of every pixel of the window in each location's sample.
            pixels = jnp.arange(24 * 32)[:, None]
            each = zip(places, weights, strict=True)
            matrix: Any = sum(jnp.where(place == pixels, weight, 0.0) for place, weight in each)
            matrix = matrix.astype(windows.dtype)
            return jnp.einsum("npf,npl->nfl", windows, matrix, preferred_element_type=jnp.float32)

        out = jnp.zeros((band * wide, features, 128))
        taps = kernel, *corners
        return lax.scan(lambda out, tap: (out + sample(*tap), None), out, taps)[0]

    out = lax.map(lambda x: sample_band(*x), (squares, *map(blocks, corners)))
    out = out.swapaxes(-1, -2).reshape(batch, high, wide, 8, 16, features).swapaxes(2, 3)
    return out.reshape(batch, high * 8, wide * 16, features)[:, :height, :width]
