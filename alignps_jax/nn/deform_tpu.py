"""Deformable convolutions on TPUs: matmuls with windows of the map in place of gathers.

A TPU reads a row of a table in several cycles and adds to one in tens, one row after another, but
multiplies 65,000 pairs of numbers in one. So the map is cut into blocks of 8 x 16 locations, which
sample their window, 24 x 32 pixels around them, by a matrix of the weights of its pixels. That
holds all samples with offsets of -7 to less than 7 pixels; the others are gathered.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from alignps_jax.nn import deform_gathers
from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_gathers import GROUP, IN_BOUNDS, Samples, sum_over_taps

BAND = 96  # blocks at a time, at most: their windows stay in the vector memory
FEW = 64  # if one location in this many has samples outside its window, those of all are gathered


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "K C F"], samples: Samples
) -> Float[Array, "B H W F"]:
    """Sum over the taps of sample(map) @ kernel, in float32, at every pixel."""
    (batch, height, width, channels), (taps, _, features) = maps.shape, kernel.shape
    y, x = samples.y, samples.x
    in_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y = y + 8 - (jnp.arange(height) // 8 * 8)[:, None, None]
    x = x + 8 - (jnp.arange(width) // 16 * 16)[:, None]
    inside = in_map & (y >= 0) & (y < 24) & (x >= 0) & (x < 32)
    places = jnp.where(inside, (y // 8 * 4 + x // 8) * 64 + y % 8 * 8 + x % 8, -1)
    outside = in_map & ~inside
    far = jnp.cumsum(outside.any((0, 4)).ravel(), dtype=jnp.int32)
    most = -(-len(far) // FEW)

    def none(maps: Array, kernel: Array, rest: Samples) -> Array:
        return jnp.zeros((batch, height, width, features))

    def few(maps: Array, kernel: Array, rest: Samples) -> Array:
        at = jnp.searchsorted(far, jnp.arange(1, most + 1), method="compare_all")
        rows, weights = (
            x.reshape(4, -1, taps).at[:, at].get(mode="fill", fill_value=0)
            for x in (rest.rows(maps), rest.weights)
        )
        found = maps.reshape(-1, channels).at[rows].get(**IN_BOUNDS) * weights[..., None]
        found = found.sum(0).astype(maps.dtype).reshape(most, -1)
        found = matmul(found, kernel.reshape(-1, features))
        zeros = none(maps, kernel, rest)
        return zeros.reshape(-1, features).at[at].add(found, mode="drop").reshape(zeros.shape)

    case = jnp.int32(far[-1] > 0) + (far[-1] > most)
    rest = samples._replace(weights=jnp.where(outside, samples.weights, 0.0))
    found = lax.switch(case, (none, few, deform_gathers.convolve), maps, kernel, rest)
    return found + _windows(maps, kernel, places, samples.weights)


def _windows(
    maps: Float[Array, "B H W C"],
    kernel: Float[Array, "K C F"],
    places: Int[Array, "4 B H W K"],
    weights: Float[Array, "4 B H W K"],
) -> Float[Array, "B H W F"]:
    """What is in the windows, where `places` are not -1; some rows of blocks at a time."""
    (batch, height, width, channels), features = maps.shape, kernel.shape[-1]
    wide = -(-width // 16)
    bands = -(-height // (8 * max(1, BAND // wide)))
    band = -(-height // (8 * bands))
    high = bands * band
    edges = (0, 0), (0, high * 8 - height), (0, wide * 16 - width)

    def blocks(x: Num[Array, "4 B H W K"]) -> Num[Array, "N 4 n 128 K"]:
        """Bands first, locations block by block."""
        x = jnp.pad(x, ((0, 0), *edges, (0, 0))).reshape(4, batch * bands, band, 8, wide, 16, -1)
        return x.transpose(1, 0, 2, 4, 3, 5, 6).reshape(batch * bands, 4, band * wide, 128, -1)

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

    def sample_tap(tap: Array, places: Array, weights: Array) -> Float[Array, "n F 128"]:
        window = tap.at[at].get(**IN_BOUNDS).reshape(-1, 24 * 32, features)
        # The weight of every pixel of the window in each location's sample.
        matrix = jnp.zeros((1, 24 * 32, 1))
        for place, weight in zip(places[:, :, None], weights[:, :, None], strict=True):
            matrix = jnp.where(place == jnp.arange(24 * 32)[:, None], weight, matrix)
        matrix = matrix.astype(window.dtype)
        return jnp.einsum("npf,npl->nfl", window, matrix, preferred_element_type=jnp.float32)

    def sample_band(squares: Array, *corners: Array) -> Float[Array, "n F 128"]:
        def sample(kernel: Array, places: Array, weights: Array) -> Any:
            projected = jnp.split(squares @ kernel, GROUP, axis=-1)
            return sum(map(sample_tap, projected, places, weights))

        out = jnp.zeros((band * wide, features, 128))
        return sum_over_taps(sample, out, kernel, *corners)

    out = lax.map(lambda x: sample_band(*x), (squares, blocks(places), blocks(weights)))
    out = out.swapaxes(-1, -2).reshape(batch, high, wide, 8, 16, features).swapaxes(2, 3)
    return out.reshape(batch, high * 8, wide * 16, features)[:, :height, :width]
