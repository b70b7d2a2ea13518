"""Where a deformable convolution reads the map, and how it does so on GPUs: by gathers.

Sampling is linear and acts per location, so it commutes with the matmul of a tap's C channels to
F: the map is projected, then sampled. Gradients are JAX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

# Options of gathers and scatters of `Samples.rows`.
IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Samples(NamedTuple):
    """The four pixels around every sample, one of each tap at each location.

    Attributes:
      y, x: row and column of the pixels, up to two pixels outside the map.
      weights: bilinear, in float32; 0 outside the map, NaN where a coordinate is.
    """

    y: Int[Array, "4 B h w K"]
    x: Int[Array, "4 B h w K"]
    weights: Float[Array, "4 B h w K"]

    def rows(self, maps: Float[Array, "B H W C"]) -> Int[Array, "4 B h w K"]:
        """Where the pixels, or the nearest ones inside, are in the table [B*H*W, C] of a map."""
        batch, height, width, _ = maps.shape
        image = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * height
        y, x = jnp.clip(self.y, 0, height - 1), jnp.clip(self.x, 0, width - 1)
        return (image + y) * width + x


def samples_at(
    y: Float[Array, "B h w K"], x: Float[Array, "B h w K"], height: int, width: int
) -> Samples:
    """The samples of a map of this height and width at given positions."""
    (rows, row_weights), (columns, column_weights) = _neighbors(y, height), _neighbors(x, width)
    pairs = rows[:, None], columns[None], row_weights[:, None] * column_weights
    return Samples(*(jnp.broadcast_to(z, (2, 2, *y.shape)).reshape(4, *y.shape) for z in pairs))


def _neighbors(
    position: Float[Array, "B h w K"], size: int
) -> tuple[Int[Array, "2 B h w K"], Float[Array, "2 B h w K"]]:
    """The pixels at or before and after each position, along one axis, and linear weights."""
    # Far outside all weights are 0 and stay so, whatever the gradient of `clip` is at its ends.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    fraction = position - first
    pixels, weights = jnp.stack([first, first + 1]), jnp.stack([1 - fraction, fraction])
    weights = jnp.where((pixels < 0) | (pixels >= size), 0.0, weights)
    return pixels.astype(jnp.int32), weights


def convolve(
    maps: Float[Array, "B H W C"], kernel: Float[Array, "K C F"], samples: Samples, group: int = 3
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel, in float32.

    Three taps at a time are fewer launches than one, for as much more memory; all nine are too wide
    for XLA's Triton code on an A100.
    """
    features = kernel.shape[-1]
    table = maps.reshape(-1, maps.shape[-1])

    def sample(kernel: Array, rows: Array, weights: Array) -> Array:
        # Of a group's taps, one map after another: a table [B*H*W * group, F].
        group = len(rows)
        projected = (table @ kernel).astype(jnp.float32).reshape(-1, features)
        rows = rows * group + jnp.arange(group).reshape(-1, 1, 1, 1, 1)
        return (projected.at[rows].get(**IN_BOUNDS) * weights[..., None]).sum((0, 1))

    return sum_over_taps(sample, group, kernel, samples.rows(maps), samples.weights)


def sum_over_taps(
    sample: Callable[..., Array],
    group: int,
    kernel: Float[Array, "K C F"],
    *corners: Num[Array, "4 *locations K"],
) -> Array:
    """Sum of `sample(kernel [C, group * F], *corners [group, 4, *locations])` over groups of taps.

    The backward pass computes each group again instead of keeping its samples.
    """
    taps, channels, features = kernel.shape
    group = group if taps % group == 0 else 1
    kernels = kernel.reshape(-1, group, channels, features).swapaxes(1, 2)
    corners = tuple(jnp.moveaxis(x, -1, 0) for x in corners)
    groups = (
        kernels.reshape(-1, channels, group * features),
        *(x.reshape(-1, group, *x.shape[1:]) for x in corners),
    )
    out = jax.eval_shape(sample, *(x[0] for x in groups))
    sample = jax.checkpoint(sample)
    zeros = jnp.zeros(out.shape, out.dtype)
    return lax.scan(lambda out, taps: (out + sample(*taps), None), zeros, groups)[0]
