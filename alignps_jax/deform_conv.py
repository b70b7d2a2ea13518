"""Deformable 3x3 convolutions (DCNv1 and DCNv2): a pure function and two Flax modules.

Every tap k of the kernel reads the map at p + k + offset(p, k), by bilinear interpolation and with
zeros outside the image; the rest is a convolution (Dai et al., "Deformable Convolutional
Networks", Eq. 2; the mask is that of Zhu et al., "Deformable ConvNets v2", Eq. 1).

How it is computed. Sampling is linear and acts per location, so it commutes with the projection
of a tap's C channels to F: whichever order is cheaper is taken, by static shape. The taps are
visited one after another in a `lax.scan` that adds up the output, and the backward pass visits
them again instead of keeping what they sampled: memory grows with the maps, not with nine times
the maps. Only the positions and weights of all samples are there at once; JAX differentiates
those. The map is a table of rows [B*H*W, C], so every read and write of a corner is contiguous.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.convolution import align_varying_axes
from alignps_jax.layers import conv

Initializer = Callable[..., Array]

# `_neighbours` clips, so that gathers and scatters need not.
_IN_BOUNDS = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def deform_conv2d(
    inputs: Float[Array, "B H W C"],
    offsets: Float[Array, "B h w K 2"],
    kernel: Float[Array, "kh kw C F"],
    mask: Float[Array, "B h w K"] | None = None,
    *,
    stride: int = 1,
    padding: int = 1,
) -> Float[Array, "B h w F"]:
    """Convolves `inputs` at displaced positions; equals `torchvision.ops.deform_conv2d`.

    Args:
      inputs: the map, float32 or bfloat16; the products are computed in this type, positions,
        interpolation weights and sums in float32.
      offsets: displacement (y, x) of each of the K = kh * kw taps (row-major) at each output
        location, in pixels of `inputs`. Any value is allowed: a sample contributes what lies
        inside the image, hence nothing if y <= -1, y >= H, x <= -1 or x >= W.
      kernel: weights; no bias.
      mask: factor of each sample, all ones (DCNv1) if None.
      stride: step between output locations, in pixels of `inputs`.
      padding: zeros around the map, which fixes h and w as in a plain convolution.

    Returns:
      The output, in the type of `inputs`. Differentiable once in all four arrays. On a pixel
      border, where interpolation has a kink, the derivative is the one towards larger
      coordinates (the position belongs to the cell that begins there), as in torchvision.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    batch, height, width, channels = inputs.shape
    kh, kw, kernel_channels, features = kernel.shape
    h = (height + 2 * padding - kh) // stride + 1
    w = (width + 2 * padding - kw) // stride + 1
    taps = (batch, h, w, kh * kw)
    if kernel_channels != channels:
        raise ValueError(f"kernel takes {kernel_channels} channels, inputs have {channels}")
    if offsets.shape != (*taps, 2):
        raise ValueError(f"offsets have shape {offsets.shape}, expected {(*taps, 2)}")
    if mask is not None and mask.shape != taps:
        raise ValueError(f"mask has shape {mask.shape}, expected {taps}")

    # Where each tap reads, all of them [kh * kw, B, h, w].
    taps_first = functools.partial(jnp.moveaxis, source=3, destination=0)
    ky, kx, y, x = jnp.meshgrid(*map(jnp.arange, (kh, kw, h, w)), indexing="ij")
    y = (y * stride - padding + ky).reshape(-1, 1, h, w) + taps_first(offsets[..., 0])
    x = (x * stride - padding + kx).reshape(-1, 1, h, w) + taps_first(offsets[..., 1])
    rows, weights = _corners(y, x, (height, width))
    if mask is not None:
        weights *= taps_first(mask).reshape(kh * kw, 1, -1)

    table, weights, kernel, rows = align_varying_axes(
        inputs.reshape(-1, channels), weights, kernel.reshape(kh * kw, channels, features), rows
    )
    out = _deform_conv(table, weights, kernel, rows)
    return out.reshape(batch, h, w, features)


def _corners(
    y: Float[Array, "K B h w"], x: Float[Array, "K B h w"], size: tuple[int, int]
) -> tuple[Int[Array, "K 4 M"], Float[Array, "K 4 M"]]:
    """Rows of the table [B*H*W, C] that hold the four pixels around each position, and weights.

    The weights are bilinear, 0 for pixels outside the image, NaN where a coordinate is.
    """
    rows, row_weights = _neighbours(y, size[0])
    columns, column_weights = _neighbours(x, size[1])
    image = np.arange(y.shape[1], dtype=np.int32)[:, None, None]
    rows = (image * size[0] + rows[:, :, None]) * size[1] + columns[:, None]
    weights = row_weights[:, :, None] * column_weights[:, None]
    return rows.reshape(len(y), 4, -1), weights.reshape(len(y), 4, -1)


def _neighbours(
    position: Float[Array, "K B h w"], size: int
) -> tuple[Int[Array, "K 2 B h w"], Float[Array, "K 2 B h w"]]:
    """The pixels at or before and after each position, along one axis, and linear weights.

    Instead of a pixel outside comes the nearest one inside, with weight 0.
    """
    # Far outside nothing changes any more; clipping keeps the conversion to integers sane.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    pixels = jnp.stack([first, first + 1], axis=1)
    fraction = position - first
    weights = jnp.stack([1 - fraction, fraction], axis=1)
    weights = jnp.where((pixels < 0) | (pixels >= size), 0.0, weights)
    return jnp.clip(pixels.astype(jnp.int32), 0, size - 1), weights


def _project_first(
    locations: int, rows: int, channels: int, features: int, *, backward: bool
) -> bool:
    """Whether to project each tap's map before sampling it, instead of the samples.

    Worth it if no more rows are multiplied and no more channels gathered. In the backward pass it
    must gather fewer, as that projects the map once more.
    """
    return rows <= locations and (features < channels if backward else features <= channels)


@jax.custom_vjp
def _deform_conv(
    table: Float[Array, "R C"],
    weights: Float[Array, "K 4 M"],
    kernel: Float[Array, "K C F"],
    rows: Int[Array, "K 4 M"],
) -> Float[Array, "M F"]:
    """Sum over the taps of sample(map) @ kernel; M are the locations of the output."""
    shape = weights.shape[-1], *table.shape, kernel.shape[-1]
    project_first = _project_first(*shape, backward=False)

    def add_tap(out, tap):
        weights, kernel, rows = tap
        kernel = kernel.astype(table.dtype)
        if project_first:
            return out + _sample(table @ kernel, rows, weights), None
        columns = _sample(table, rows, weights).astype(table.dtype)
        return out + jnp.matmul(columns, kernel, preferred_element_type=out.dtype), None

    out_shape = shape[0], shape[-1]
    zeros = jnp.zeros_like(table, dtype=jnp.float32, shape=out_shape)
    out, _ = lax.scan(add_tap, zeros, (weights, kernel, rows))
    return out.astype(table.dtype)


def _deform_conv_bwd(residuals, d_out):
    """Cotangents of table, weights and kernel from that of the output [M, F]."""
    table, weights, kernel, rows = residuals
    shape = weights.shape[-1], *table.shape, kernel.shape[-1]
    project_first = _project_first(*shape, backward=True)
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    # Once for all taps: XLA's matrix product on CPU is slow when its left side is transposed.
    transposed = (table if project_first else d_out).T

    def add_tap(d_table, tap):
        weights, kernel, rows = tap
        kernel = kernel.astype(table.dtype)
        if project_first:
            projected = table @ kernel
            d_weights = _corner_products(projected, rows, d_out)
            d_projected = jnp.zeros_like(projected, dtype=jnp.float32)
            d_projected = _scatter(d_projected, rows, weights, d_out).astype(table.dtype)
            d_kernel = matmul(transposed, d_projected)
            d_table += matmul(d_projected, kernel.T)
        else:
            columns = _sample(table, rows, weights).astype(table.dtype)
            d_kernel = matmul(transposed, columns)
            d_columns = matmul(d_out, kernel.T)
            # Behind a barrier: XLA would store the corners, for `columns` and this to share.
            d_weights = _corner_products(table, lax.optimization_barrier(rows), d_columns)
            d_table = _scatter(d_table, rows, weights, d_columns)
        return d_table, (d_weights, d_kernel)

    zeros = jnp.zeros_like(table, dtype=jnp.float32)
    d_table, (d_weights, d_kernel) = lax.scan(add_tap, zeros, (weights, kernel, rows))
    d_kernel = d_kernel if project_first else d_kernel.mT
    return d_table.astype(table.dtype), d_weights, d_kernel.astype(kernel.dtype), None


_deform_conv.defvjp(lambda *args: (_deform_conv(*args), args), _deform_conv_bwd)


def _sample(
    table: Float[Array, "R C"], rows: Int[Array, "4 M"], weights: Float[Array, "4 M"]
) -> Float[Array, "M C"]:
    """Weighted sum of the four corners, in float32."""
    return sum(
        w[:, None] * table.at[r].get(**_IN_BOUNDS) for r, w in zip(rows, weights, strict=True)
    )


def _scatter(
    table: Float[Array, "R C"],
    rows: Int[Array, "4 M"],
    weights: Float[Array, "4 M"],
    values: Float[Array, "M C"],
) -> Float[Array, "R C"]:
    """The transpose of `_sample`, added to `table`."""

    def add_corner(table, corner):
        rows, weights = corner
        return table.at[rows].add(weights[:, None] * values, **_IN_BOUNDS), None

    return lax.scan(add_corner, table, (rows, weights))[0]


def _corner_products(
    table: Float[Array, "R C"], rows: Int[Array, "4 M"], values: Float[Array, "M C"]
) -> Float[Array, "4 M"]:
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
    return jnp.stack(sums).sum(axis=-1)


class DeformConv(nn.Module):
    """DCNv1: 3x3, padding 1; offsets from a plain 3x3 convolution of the same map.

    Parameters: `kernel` [3, 3, C, features], `bias` [features] if `use_bias`, and the `offset`
    convolution, whose channels are y0, x0, y1, x1, ... of the taps in row-major order, in pixels
    of the map. Parameters are float32, activations `dtype`. Initially the offsets are zero.
    """

    features: int
    stride: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    # Uniform within 1 / sqrt(9 * C).
    kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    offset_kernel_init: Initializer = nn.initializers.zeros
    offset_bias_init: Initializer = nn.initializers.zeros

    channels_per_tap: ClassVar[int] = 2

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """Returns the map at ceil(H / stride) x ceil(W / stride) locations."""
        inputs = inputs.astype(self.dtype)
        predicted = conv(
            9 * self.channels_per_tap,
            3,
            self.stride,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=self.offset_kernel_init,
            bias_init=self.offset_bias_init,
            name="offset",
        )(inputs)
        offsets, mask = self.split(predicted.astype(jnp.float32))
        kernel = self.param("kernel", self.kernel_init, (3, 3, inputs.shape[-1], self.features))
        out = deform_conv2d(inputs, offsets, kernel, mask, stride=self.stride)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out

    def split(self, predicted: Float[Array, "B h w N"]) -> tuple[Array, Array | None]:
        """Offsets [B, h, w, 9, 2] and mask [B, h, w, 9] from the channels of `offset`."""
        return predicted.reshape(*predicted.shape[:-1], 9, 2), None


class ModulatedDeformConv(DeformConv):
    """DCNv2: like `DeformConv`; nine more `offset` channels, through a sigmoid, are the mask."""

    channels_per_tap: ClassVar[int] = 3

    def split(self, predicted: Float[Array, "B h w N"]) -> tuple[Array, Array]:
        """Offsets [B, h, w, 9, 2] and mask [B, h, w, 9] from the channels of `offset`."""
        offsets, _ = super().split(predicted[..., :18])
        return offsets, nn.sigmoid(predicted[..., 18:])
