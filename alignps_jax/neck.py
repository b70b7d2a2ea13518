"""Aligned feature aggregation (AFA), paper section 3.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from alignps_jax.deform_conv import DeformConv
from alignps_jax.layers import conv, hold_zero, masked_mean

FeatureMap = Float[Array, "B h w C"]


def upsample_nearest(x: FeatureMap, factor: int = 2) -> FeatureMap:
    """Every pixel `factor` x `factor` times."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


class AlignedFeatureAggregation(nn.Module):
    """C3, C4, C5 -> P3, by lateral and output 3x3 deformable convolutions and concatenation.

    The spatial mean of P3 over the valid region is subtracted (released code; gradients flow
    through it): the result is at once the map of embeddings and the input of the head.

    The offset convolutions start as Xavier uniform times `offset_gain` (released code: 1).
    With `background_levels` the maps P4 to P7 follow, strides 16 to 128, which the released code
    feeds to the head in training as pure background.
    """

    features: int = 256
    offset_gain: float = 1.0
    background_levels: bool = False
    dtype: str = "float32"
    make_conv: Callable[..., nn.Module] = DeformConv

    @nn.compact
    def __call__(
        self, maps: Sequence[FeatureMap], extent: Int[Array, "B 2"], *, train: bool
    ) -> tuple[FeatureMap, ...]:
        """Aggregates C3, C4, C5; `extent` is the valid region of the image in pixels.

        Returns (P3,), in training with `background_levels` (P3, P4, P5, P6, P7).
        """
        lateral3, lateral4, lateral5 = (
            self._deform(f"lateral{level}", c, extent // 2**level)
            for level, c in zip((3, 4, 5), maps, strict=True)
        )
        top4 = jnp.concatenate([lateral4, upsample_nearest(lateral5)], axis=-1)
        top3 = jnp.concatenate([lateral3, upsample_nearest(top4)], axis=-1)
        p3 = self._deform("output3", top3, extent // 8)
        p3 = hold_zero(p3 - masked_mean(p3, extent // 8).astype(p3.dtype), extent // 8)
        # Initialisation makes all parameters, so that training and inference have the same ones.
        if not self.background_levels or not (train or self.is_initializing()):
            return (p3,)
        p4 = self._deform("output4", top4, extent // 16)
        p5 = self._deform("output5", lateral5, extent // 32)
        p6 = hold_zero(self._downsample("output6", p5), -(-extent // 64))
        p7 = hold_zero(self._downsample("output7", nn.relu(p6)), -(-extent // 128))
        return p3, p4, p5, p6, p7

    def _deform(self, name: str, x: FeatureMap, extent: Int[Array, "B 2"]) -> FeatureMap:
        layer = self.make_conv(
            self.features,
            offset_kernel_init=self._offset_init(),
            dtype=self.dtype,
            name=name,
        )
        return hold_zero(layer(x), extent)

    def _offset_init(self) -> Callable[..., Array]:
        if self.offset_gain == 0:
            return nn.initializers.zeros
        # Xavier uniform times the gain.
        return nn.initializers.variance_scaling(self.offset_gain**2, "fan_avg", "uniform")

    def _downsample(self, name: str, x: FeatureMap) -> FeatureMap:
        init = nn.initializers.xavier_uniform()
        layer = conv(
            self.features, 3, 2, use_bias=True, kernel_init=init, dtype=self.dtype, name=name
        )
        return layer(x)
