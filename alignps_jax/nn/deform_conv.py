"""Deformable 3x3 convolutions: a pure function and a Flax module.

Every tap k of the kernel reads the map at p + k + offset(p, k), by bilinear interpolation (Dai et
al., "Deformable Convolutional Networks", Eq. 2; Zhu et al., "Deformable ConvNets v2", Eq. 1): by
tiles on CPUs, by windows on TPUs, by gathers elsewhere.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignps_jax.nn import deform_cpu, deform_gathers, deform_tpu
from alignps_jax.nn.deform_gathers import Samples, neighbors
from alignps_jax.nn.layers import conv
from alignps_jax.nn.platforms import on_platform


def deform_conv2d(
    inputs: Float[Array, "B H W C"],
    offsets: Float[Array, "B h w 9 2"],
    kernel: Float[Array, "3 3 C F"],
    mask: Float[Array, "B h w 9"] | None = None,
    *,
    stride: int = 1,
) -> Float[Array, "B h w F"]:
    """Equals `torchvision.ops.deform_conv2d` with padding 1, in the type of `inputs`.

    It is differentiable once in all four arrays. On a pixel border, where interpolation has a
    kink, the derivative is the one towards larger coordinates, as in torchvision.

    Args:
      inputs: the map, float32 or bfloat16, the type of the matmuls; all else is float32.
      offsets: displacement (y, x) of each tap (row-major) at each output location, in pixels of
        `inputs`. A sample contributes what lies inside the map: nothing if y <= -1 or y >= H.
      mask: factor of each sample, all ones (DCNv1) if None.
      stride: step between output locations, in pixels of `inputs`.
    """
    (_, height, width, channels), (h, w) = inputs.shape, offsets.shape[1:3]
    y, x, ky, kx = jnp.meshgrid(*map(jnp.arange, (h, w, 3, 3)), indexing="ij")
    y = (y * stride - 1 + ky).reshape(h, w, 9) + offsets[..., 0]
    x = (x * stride - 1 + kx).reshape(h, w, 9) + offsets[..., 1]
    (y, y_weights), (x, x_weights) = neighbors(y, height), neighbors(x, width)
    samples = Samples(y, x, y_weights, x_weights, 1.0 if mask is None else mask)
    kernel = kernel.reshape(9, channels, -1).astype(inputs.dtype)
    tpu = deform_tpu if stride == 1 else deform_gathers
    ways = {"cpu": deform_cpu.convolve, "tpu": tpu.convolve, "default": deform_gathers.convolve}
    return on_platform(inputs, kernel, samples, **ways).astype(inputs.dtype)


class DeformConv(nn.Module):
    """A deformable convolution with offsets from a plain 3x3 convolution of the same map.

    Attributes:
      modulated: nine more channels than y0, x0, y1, ..., through a sigmoid, are the mask (DCNv2).
      offset_gain: offsets start as Xavier uniform times this.
    """

    features: int
    stride: int = 1
    modulated: bool = False
    use_bias: bool = False
    offset_gain: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """Returns the map at ceil(H / stride) x ceil(W / stride) locations."""
        inputs = inputs.astype(self.dtype)
        predicted = conv(
            27 if self.modulated else 18,
            3,
            self.stride,
            use_bias=True,
            # An offset of 20 pixels in bfloat16 is a multiple of 1/8 pixel.
            dtype=jnp.float32,
            kernel_init=nn.initializers.variance_scaling(self.offset_gain**2, "fan_avg", "uniform"),
            name="offset",
        )(inputs)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # 1 / sqrt(9 * C)
        kernel = self.param("kernel", uniform, (3, 3, inputs.shape[-1], self.features))
        if self.is_initializing():  # nothing of the map but its shape matters
            out = jnp.zeros((*predicted.shape[:-1], self.features), self.dtype)
        else:
            offsets = predicted[..., :18].reshape(*predicted.shape[:-1], 9, 2)
            mask = nn.sigmoid(predicted[..., 18:]) if self.modulated else None
            out = deform_conv2d(inputs, offsets, kernel, mask, stride=self.stride)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out
