"""Where a deformable convolution reads the map, and how it does so on GPUs: by gathers.

Sampling is linear, so the map is projected first, from C channels to F of each tap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

# Taps at a time: fewer launches than one, for as much more memory; all nine are too wide for XLA's
# Triton code on an A100.
GROUP = 3
# Options of gathers and scatters of `Samples.rows`.
IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Samples(NamedTuple):
    """The four pixels around every sample, up to two pixels outside the map, and their weights.

    Weights are bilinear, in float32; 0 outside the map, NaN where a coordinate is.
    """

    y: Int[Array, "4 B h w 9"]
    x: Int[Array, "4 B h w 9"]
    weights: Float[Array, "4 B h w 9"]

    def rows(self, maps: Float[Array, "B H W C"]) -> Int[Array, "4 B h w 9"]:
        """Where the pixels, or the nearest ones inside, are in the table [B*H*W, C]."""
        batch, height, width, _ = maps.shape
        image = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * height
        y, x = jnp.clip(self.y, 0, height - 1), jnp.clip(self.x, 0, width - 1)
        return (image + y) * width + x


def samples_at(
    y: Float[Array, "B h w 9"], x: Float[Array, "B h w 9"], height: int, width: int
) -> Samples:
    """The samples of a map of this height and width at given positions."""
    corners = [
        (row, column, row_weight * column_weight)
        for row, row_weight in _neighbors(y, height)
        for column, column_weight in _neighbors(x, width)
    ]
    return Samples(*map(jnp.stack, zip(*corners, strict=True)))


def _neighbors(position: Float[Array, "B h w 9"], size: int) -> list[tuple[Array, Array]]:
    """The pixels at or before and after each position, along one axis, with linear weights."""
    # Far outside all weights are 0 and stay so, whatever the gradient of `clip` is at its ends.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    fraction = position - first
    return [
        (pixel.astype(jnp.int32), jnp.where((pixel < 0) | (pixel >= size), 0.0, weight))
        for pixel, weight in ((first, 1 - fraction), (first + 1, fraction))
    ]


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "9 C F"], samples: Samples
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel, in float32."""
    table, features = maps.reshape(-1, maps.shape[-1]), kernel.shape[-1]

    def sample(kernel: Array, rows: Array, weights: Array) -> Array:
        # Of the group's taps, one map after another: a table [B*H*W * GROUP, F].
        projected = (table @ kernel).astype(jnp.float32).reshape(-1, features)
        rows = rows * GROUP + jnp.arange(GROUP).reshape(-1, 1, 1, 1, 1)
        return (projected.at[rows].get(**IN_BOUNDS) * weights[..., None]).sum((0, 1))

    out = jnp.zeros((*samples.y.shape[1:-1], features))
    return sum_over_taps(sample, out, kernel, samples.rows(maps), samples.weights)


def sum_over_taps(
    sample: Callable[..., Array],
    out: Float[Array, "..."],
    kernel: Float[Array, "9 C F"],
    *corners: Num[Array, "4 *locations 9"],
) -> Float[Array, "..."]:
    """`out` plus `sample(kernel [C, GROUP * F], *corners [GROUP, 4, *locations])` of all groups.

    The backward pass computes each group of taps again instead of keeping its samples.
    """
    channels = kernel.shape[1]
    kernels = kernel.reshape(-1, GROUP, channels, kernel.shape[2]).swapaxes(1, 2)
    kernels = kernels.reshape(len(kernels), channels, -1)
    by_tap = (jnp.moveaxis(x, -1, 0) for x in corners)
    groups = kernels, *(x.reshape(-1, GROUP, *x.shape[1:]) for x in by_tap)
    sample = jax.checkpoint(sample)
    return lax.scan(lambda out, taps: (out + sample(*taps), None), out, groups)[0]
