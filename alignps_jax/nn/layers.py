"""Layers that look at the valid region only, so that bucket padding never changes a result.

A feature map comes with the height and width of its valid region (`valid_size`), and is zero
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


def minus_mean(x: Map, valid_size: ValidSize) -> Map:
    """Maps less their mean over the valid region, in float32 (Released code)."""
    x = x.astype(jnp.float32)
    count = jnp.maximum(valid_size[:, 0] * valid_size[:, 1], 1).astype(jnp.float32)
    mean = x.sum((1, 2), keepdims=True) / count[:, None, None, None]
    return mask_padding(x - mean, valid_size)


def rescale(
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
        return rescale(*self.affine(x.shape[-1]), x, valid_size)


class GroupNorm(nn.Module):
    """Group normalization whose statistics run over the valid region only."""

    groups: int = 32

    @nn.compact
    def __call__(self, x: Map, valid_size: ValidSize) -> Map:
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)
        valid = valid_mask(valid_size, H, W)[..., None]
        count = jnp.maximum(valid.sum((1, 2)), 1) * (C // self.groups)

        def group_mean(values: Map) -> Float[Array, "B C"]:
            per_channel = values.sum((1, 2)).reshape(B, self.groups, -1)
            return jnp.repeat(per_channel.sum(-1) / count, C // self.groups, axis=-1)

        x32 = jnp.where(valid, x, 0).astype(jnp.float32)
        mean = group_mean(x32)[:, None, None]
        centered = jnp.where(valid, x32 - mean, 0)
        factor = scale * lax.rsqrt(group_mean(jnp.square(centered)) + EPSILON)[:, None, None]
        return jnp.where(valid, centered * factor + bias, 0).astype(x.dtype)


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
