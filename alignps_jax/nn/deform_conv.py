"""Deformable 3x3 convolutions (DCNv1 and DCNv2): a pure function and a Flax module.

Every tap k of the kernel reads the map at p + k + offset(p, k), by bilinear interpolation (Dai et
al., "Deformable Convolutional Networks", Eq. 2; Zhu et al., "Deformable ConvNets v2", Eq. 1).

Samples are taken and multiplied in the way that is fast on the platform: by tiles on CPUs
(`deform_cpu.py`), by windows on TPUs (`deform_tpu.py`), by gathers elsewhere (`deform_gathers.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alignps_jax.nn import deform_cpu, deform_gathers, deform_tpu
from alignps_jax.nn.deform_gathers import samples_at
from alignps_jax.nn.layers import conv

scaled = nn.initializers.variance_scaling


def deform_conv2d(
    inputs: Float[Array, "B H W C"],
    offsets: Float[Array, "B h w K 2"],
    kernel: Float[Array, "k k C F"],
    mask: Float[Array, "B h w K"] | None = None,
    *,
    stride: int = 1,
) -> Float[Array, "B h w F"]:
    """Convolves `inputs` at displaced positions; equals `torchvision.ops.deform_conv2d`.

    Args:
      inputs: the map, float32 or bfloat16, the type of the matmuls; all else is float32.
      offsets: displacement (y, x) of each of the K = k * k taps (row-major) at each output
        location, in pixels of `inputs`. Any value is allowed: a sample contributes what lies
        inside the image, hence nothing if y <= -1, y >= H, x <= -1 or x >= W.
      kernel: weights, of an odd size k; k // 2 zeros are around the map, as in a plain convolution.
      mask: factor of each sample, all ones (DCNv1) if None.
      stride: step between output locations, in pixels of `inputs`.

    Returns:
      The output, in the type of `inputs`. Differentiable once in all four arrays. On a pixel
      border, where interpolation has a kink, the derivative is the one towards larger
      coordinates (the position belongs to the cell that begins there), as in torchvision.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    batch, height, width, channels = inputs.shape
    side, _, kernel_channels, features = kernel.shape
    h, w = ((size - 1) // stride + 1 for size in (height, width))
    taps = (batch, h, w, side**2)
    if kernel_channels != channels:
        raise ValueError(f"kernel takes {kernel_channels} channels, inputs have {channels}")
    if offsets.shape != (*taps, 2):
        raise ValueError(f"offsets have shape {offsets.shape}, expected {(*taps, 2)}")
    if mask is not None and mask.shape != taps:
        raise ValueError(f"mask has shape {mask.shape}, expected {taps}")

    # Where each tap reads, [B, h, w, K].
    y, x, ky, kx = jnp.meshgrid(*map(jnp.arange, (h, w, side, side)), indexing="ij")
    y = (y * stride - side // 2 + ky).reshape(h, w, -1) + offsets[..., 0]
    x = (x * stride - side // 2 + kx).reshape(h, w, -1) + offsets[..., 1]
    samples = samples_at(y, x, height, width)
    if mask is not None:
        samples = samples._replace(weights=samples.weights * mask)
    kernel = kernel.reshape(-1, channels, features).astype(inputs.dtype)
    inputs = jnp.asarray(inputs)
    ways = {"cpu": deform_cpu.convolve, "default": deform_gathers.convolve}
    if stride == 1:
        ways["tpu"] = deform_tpu.convolve
    out = lax.platform_dependent(inputs, kernel, samples, **ways)
    return out.astype(inputs.dtype)


class DeformConv(nn.Module):
    """3x3, padding 1; offsets from a plain 3x3 convolution of the same map.

    Parameters: `kernel` [3, 3, C, features], `bias` [features] if `use_bias`, and the `offset`
    convolution, whose channels are y0, x0, y1, x1, ... of the taps in row-major order, in pixels
    of the map. Parameters and offsets are float32, activations `dtype`.

    Attributes:
      modulated: nine more `offset` channels, through a sigmoid, are the mask (DCNv2).
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
            kernel_init=scaled(self.offset_gain**2, "fan_avg", "uniform"),
            name="offset",
        )(inputs)
        # Uniform within 1 / sqrt(9 * C).
        shape = (3, 3, inputs.shape[-1], self.features)
        kernel = self.param("kernel", scaled(1 / 3, "fan_in", "uniform"), shape)
        if self.is_initializing():  # nothing of the map but its shape matters
            out = jnp.zeros((*predicted.shape[:-1], self.features), self.dtype)
        else:
            offsets = predicted[..., :18].reshape(*predicted.shape[:-1], 9, 2)
            mask = nn.sigmoid(predicted[..., 18:]) if self.modulated else None
            out = deform_conv2d(inputs, offsets, kernel, mask, stride=self.stride)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out
