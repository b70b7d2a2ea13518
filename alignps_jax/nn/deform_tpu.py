"""Deformable convolutions on TPUs: matmuls with windows of the map in place of gathers.

A TPU reads a row of a table in several cycles and adds to one in tens, one row after another, but
multiplies 65,000 pairs of numbers in one. So the map is cut into blocks of 8 x 16 locations. What
they sample lies in their window, 24 x 32 pixels around them: the samples of a tap are a matrix,
which has the weights of the pixels in every sample, times the projected window. All samples are in
the windows if the offsets of a 3x3 convolution are -7 to 7 pixels, without 7 itself. The few
locations with others take these by gathers; where there are many, all samples are gathered.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from alignps_jax.nn import deform_gathers
from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Samples, sum_over_taps

BAND = 96  # blocks that are worked on at a time, at most: their windows stay in the vector memory
GROUP = 3  # taps that are projected by one matmul
FEW = 64  # at most one location in this many may have samples outside its window


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "K C F"], samples: Samples
) -> Float[Array, "B H W F"]:
    """Sum over the taps of sample(map) @ kernel, in float32, at every pixel."""
    (_, height, width, _), y, x = maps.shape, samples.y, samples.x
    in_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y = y + 8 - (jnp.arange(height) // 8 * 8)[:, None, None]
    x = x + 8 - (jnp.arange(width) // 16 * 16)[:, None]
    inside = in_map & (y >= 0) & (y < 24) & (x >= 0) & (x < 32)
    places = jnp.where(inside, (y // 8 * 4 + x // 8) * 64 + y % 8 * 8 + x % 8, -1)
    outside = in_map & ~inside
    far = jnp.cumsum(outside.any((0, 4)).ravel(), dtype=jnp.int32)
    most = -(-len(far) // FEW)

    def with_few(maps: Array, kernel: Array, weights: Array) -> Array:
        at = jnp.searchsorted(far, jnp.arange(1, most + 1), method="compare_all")
        rest = samples._replace(weights=jnp.where(outside, weights, 0.0))
        return _windows(maps, kernel, places, weights) + _at_locations(maps, kernel, rest, at)

    def with_many(maps: Array, kernel: Array, weights: Array) -> Array:
        return deform_gathers.convolve(maps, kernel, samples._replace(weights=weights), group=1)

    return lax.cond(far[-1] <= most, with_few, with_many, maps, kernel, samples.weights)


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
    around = jnp.arange(bands)[:, None] * band + jnp.arange(-1, band + 1)
    squares = squares.swapaxes(2, 3)[:, jnp.clip(around, 0, high - 1)]
    squares = squares.reshape(batch * bands, -1, 64, channels)
    # Which ones make the windows, 3 rows of 4; instead of one outside the map, one inside.
    at = (jnp.arange(band)[:, None] + jnp.arange(3))[:, None, :, None] * (2 * wide)
    columns = 2 * jnp.arange(wide)[:, None] + jnp.arange(-1, 3)
    at = (at + jnp.clip(columns, 0, 2 * wide - 1)[:, None]).ravel()

    def sample_band(band: tuple[Array, ...]) -> Float[Array, "n F 128"]:
        squares, *corners = band

        def sample(kernel: Array, places: Array, weights: Array) -> Array:
            projected = jnp.split(squares @ kernel, len(places), axis=-1)
            total: Any = sum(map(sample_tap, projected, places, weights))
            return total

        return sum_over_taps(sample, GROUP, kernel, *corners)

    def sample_tap(tap: Array, places: Array, weights: Array) -> Float[Array, "n F 128"]:
        window = tap.at[at].get(**IN_BOUNDS).reshape(-1, 24 * 32, features)
        # The weight of every pixel of the window in each location's sample.
        matrix = jnp.zeros((1, 24 * 32, 1))
        for place, weight in zip(places[:, :, None], weights[:, :, None], strict=True):
            matrix = jnp.where(place == jnp.arange(24 * 32)[:, None], weight, matrix)
        matrix = matrix.astype(window.dtype)
        return jnp.einsum("npf,npl->nfl", window, matrix, preferred_element_type=jnp.float32)

    out = lax.map(sample_band, (squares, blocks(places), blocks(weights)))
    out = out.swapaxes(-1, -2).reshape(batch, high, wide, 8, 16, features).swapaxes(2, 3)
    return out.reshape(batch, high * 8, wide * 16, features)[:, :height, :width]


def _at_locations(
    maps: Float[Array, "B H W C"],
    kernel: Float[Array, "K C F"],
    samples: Samples,
    at: Int[Array, "L"],
) -> Float[Array, "B H W F"]:
    """The convolution at some locations, zero elsewhere and where `at` is beyond the last one."""
    (batch, height, width, channels), (taps, _, features) = maps.shape, kernel.shape
    rows, weights = (
        x.reshape(4, -1, taps).at[:, at].get(mode="fill", fill_value=0)
        for x in (samples.rows(maps), samples.weights)
    )
    found = maps.reshape(-1, channels).at[rows].get(**IN_BOUNDS) * weights[..., None]
    found = found.sum(0).astype(maps.dtype).reshape(len(at), -1)
    zeros = jnp.zeros((batch * height * width, features))
    out = zeros.at[at].add(matmul(found, kernel.reshape(-1, features)), mode="drop")
    return out.reshape(batch, height, width, features)
