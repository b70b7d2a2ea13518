"""Layers that look at the valid region only, so that bucket padding never changes a result.

Every feature map comes with a `valid_size`, height and width of its valid region. It is zero
outside of it, as a convolution sees a map beyond its border.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.nn.convolution import Map, conv2d

ValidSize = Int[Array, "B 2"]

# Photos are fed padded to a multiple of this (Released code), the largest stride of the backbone.
SIZE_MULTIPLE = 32
EPSILON = 1e-5  # of both normalizations


def round_up(size: ValidSize) -> ValidSize:
    """Valid size of a photo: the network sees it padded with zeros to a multiple of 32."""
    return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE


def valid_mask(valid_size: ValidSize, height: int, width: int) -> Bool[Array, "B H W"]:
    """True inside the valid region of a map of the given height and width."""
    rows = jnp.arange(height)[None, :, None] < valid_size[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < valid_size[:, 1, None, None]
    return rows & columns


def mask_padding(x: Map, valid_size: ValidSize) -> Map:
    """`x` with zeros outside the valid region."""
    valid = valid_mask(valid_size, x.shape[1], x.shape[2])
    return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))


def subtract_mean(x: Map, valid_size: ValidSize) -> Map:
    """Maps less their mean over the valid region, in float32 (Released code)."""
    x = x.astype(jnp.float32)
    count = jnp.maximum(valid_size[:, 0] * valid_size[:, 1], 1).astype(jnp.float32)
    mean = x.sum((1, 2), keepdims=True) / count[:, None, None, None]
    return mask_padding(x - mean, valid_size)


def scale_and_shift(
    factor: Float[Array, "C"], shift: Float[Array, "C"], x: Map, valid_size: ValidSize
) -> Map:
    """`x * factor + shift` in the valid region, computed in float32."""
    return mask_padding((x * factor + shift).astype(x.dtype), valid_size)


class FrozenBatchNorm(nn.Module):
    """Batch normalization with fixed statistics and affine parameters (collection `frozen`)."""

    @nn.compact
    def affine(self, channels: int) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
        """The factor of each channel, and what is added to it then."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, bias, mean, var = (
            self.variable("frozen", name, init, None, (channels,), jnp.float32).value
            for name, init in {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}.items()
        )
        factor = scale * lax.rsqrt(var + EPSILON)
        return factor, bias - mean * factor

    def __call__(self, x: Map, valid_size: ValidSize) -> Map:
        return scale_and_shift(*self.affine(x.shape[-1]), x, valid_size)


class GroupNorm(nn.GroupNorm):
    """Group normalization whose statistics run over the valid region only."""

    epsilon: float = EPSILON
    use_fast_variance: bool = False

    def __call__(self, x: Map, valid_size: ValidSize) -> Map:  # type: ignore[override]
        valid = valid_mask(valid_size, x.shape[1], x.shape[2])[..., None]
        mask = valid | ~valid.any((1, 2), keepdims=True)  # finite where nothing is valid, too
        y = super().__call__(x.astype(jnp.float32), mask=jnp.broadcast_to(mask, x.shape))
        return mask_padding(y.astype(x.dtype), valid_size)


def conv(
    features: int, size: int, stride: int = 1, *, use_bias: bool = False, **kwargs: Any
) -> nn.Conv:
    """A square convolution with the symmetric padding of PyTorch, not XLA's `SAME`."""
    return nn.Conv(
        features,
        (size, size),
        use_bias=use_bias,
        # Flax's remaining arguments are all defaults here.
        conv_general_dilated=lambda x, kernel, *_, **__: conv2d(x, kernel, stride=stride),
        **kwargs,
    )
