"""Where a deformable convolution reads the map, and how it does so on GPUs: by gathers.

Sampling is linear, so the map is projected first, from C channels to F of each tap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Taps at a time on GPUs: fewer launches than one, for as much more memory; all nine are too wide
# for XLA's Triton code on an A100.
GROUP = 3
# Options of gathers and scatters of `Samples.corners`.
IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class Samples(NamedTuple):
    """The two rows and the two columns around every sample, up to two pixels outside the map.

    Weights are linear, in float32; 0 outside the map, NaN where a coordinate is.
    """

    y: Int[Array, "2 B h w 9"]
    x: Int[Array, "2 B h w 9"]
    y_weights: Float[Array, "2 B h w 9"]
    x_weights: Float[Array, "2 B h w 9"]
    mask: Float[Array, "B h w 9"] | float

    def corners(
        self, maps: Float[Array, "B H W C"]
    ) -> tuple[Int[Array, "4 B h w 9"], Float[Array, "4 B h w 9"]]:
        """Four pixels: where they, or the nearest ones inside, are in [B*H*W, C]; weights."""
        batch, height, width, _ = maps.shape
        image = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * height
        y, x = jnp.clip(self.y, 0, height - 1), jnp.clip(self.x, 0, width - 1)
        rows = (image + y)[:, None] * width + x
        weights = self.y_weights[:, None] * self.x_weights * self.mask
        return rows.reshape(4, *rows.shape[2:]), weights.reshape(4, *rows.shape[2:])


def neighbors(
    position: Float[Array, "B h w 9"], size: int
) -> tuple[Int[Array, "2 B h w 9"], Float[Array, "2 B h w 9"]]:
    """The pixels at or before and after each position, along one axis, with linear weights."""
    # Far outside all weights are 0 and stay so, whatever the gradient of `clip` is at its ends.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    fraction = position - first
    pixels, weights = jnp.stack([first, first + 1]), jnp.stack([1 - fraction, fraction])
    weights = jnp.where((pixels < 0) | (pixels >= size), 0.0, weights)
    return pixels.astype(jnp.int32), weights


def convolve(
    maps: Float[Array, "B H W C"],
    kernel: Float[Array, "9 C F"],
    samples: Samples,
    group: int = GROUP,
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel, in float32; `group` of them at a time."""
    (_, channels, features), table = kernel.shape, maps.reshape(-1, maps.shape[-1])

    @jax.checkpoint  # the backward pass samples again instead of keeping the samples
    def sample(kernel: Array, rows: Array, weights: Array) -> Array:
        # Of the group's taps, one map after another: a table [B*H*W * group, F].
        projected = (table @ kernel).astype(jnp.float32).reshape(-1, features)
        rows = rows * group + jnp.arange(group).reshape(-1, 1, 1, 1, 1)
        return (projected.at[rows].get(**IN_BOUNDS) * weights[..., None]).sum((0, 1))

    kernels = kernel.reshape(-1, group, channels, features).swapaxes(1, 2)
    taps = (jnp.moveaxis(x, -1, 0) for x in samples.corners(maps))
    corners = (x.reshape(-1, group, *x.shape[1:]) for x in taps)
    groups = kernels.reshape(-1, channels, group * features), *corners
    out = jnp.zeros((*samples.y.shape[1:-1], features))
    return lax.scan(lambda out, taps: (out + sample(*taps), None), out, groups)[0]
