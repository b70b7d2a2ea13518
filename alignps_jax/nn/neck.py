"""Aligned feature aggregation (AFA; Paper, Sec. 3.2), and the feature pyramid it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.layers import ValidSize, conv, mask_padding, minus_mean

FeatureMap = Float[Array, "B _ _ _"]  # [B, h, w, C], of sizes that differ from map to map


def upsample_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    """Every pixel 2 x 2 times."""
    return x.repeat(2, axis=2).repeat(2, axis=1)


class AlignedFeatureAggregation(nn.Module):
    """C3, C4, C5 -> the maps P3 to P7 that are asked for; AlignPS asks for P3 only.

    P3, P4 and P5 are lateral convolutions of C3, C4, C5, each joined with the ones above it, then
    an output convolution; P6 and P7 (FCOS) are convolutions of stride 2 of P5 and ReLU(P6). Only
    what the wanted levels need is made, parameters included. The spatial mean of each map of
    `levels` over the valid region is subtracted (Released code; gradients flow through it).

    Attributes:
      features: channels of every lateral and of every P.
      levels: numbers of the maps to make, ascending in 3..7; level l has stride 2**l.
      background_levels: further ones, in training only (Released code: 4 to 7), mean and all.
      lateral_deform, output_deform: which convolutions are deformable (Paper: both).
      concatenate: how a lateral map and those above it are joined (Paper: so); else they are added.
      offset_gain: see `DeformConv`.
      remat: the backward pass computes deformable convolutions again.
    """

    features: int
    levels: tuple[int, ...] = (3,)
    background_levels: tuple[int, ...] = ()
    lateral_deform: bool = True
    output_deform: bool = True
    concatenate: bool = True
    offset_gain: float = 1.0
    remat: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, maps: Sequence[FeatureMap], valid_size: ValidSize, *, train: bool
    ) -> tuple[FeatureMap, ...]:
        """The maps of `levels`, then, in training, of `background_levels`; zero where not valid.

        `valid_size` is the valid region of the image in pixels.
        """
        # Initialization makes all parameters, so that training and inference have the same ones.
        wanted = self.levels + (self.background_levels if train or self.is_initializing() else ())
        plain = partial(conv, kernel_init=nn.initializers.xavier_uniform())
        deform_conv = nn.remat(DeformConv) if self.remat else DeformConv
        deform = partial(deform_conv, offset_gain=self.offset_gain)
        lateral = deform if self.lateral_deform else partial(plain, size=1)
        output = deform if self.output_deform else partial(plain, size=3)
        coarser = partial(plain, size=3, stride=2, use_bias=True)

        def convolved(kind: str, make: Callable, x: FeatureMap, level: int) -> FeatureMap:
            layer = make(self.features, dtype=self.dtype, name=f"{kind}{level}")
            return mask_padding(layer(x), level_size(valid_size, level))

        levels = range(min(*wanted, 5), 6)
        # Laterals give every level as many channels, and move what they read (alignment).
        top = {level: convolved("lateral", lateral, maps[level - 3], level) for level in levels}
        # From the top down, what lies above joins each level: context for embeddings (Sec. 3.2).
        for level in reversed(levels[:-1]):
            above = upsample_nearest(top[level + 1])
            if self.concatenate:
                top[level] = jnp.concatenate([top[level], above], axis=-1)
            else:
                top[level] += above
        # Output convolutions bring the joined channels back to `features`.
        made = {
            level: convolved("output", output, top[level], level)
            for level in levels
            if level in wanted or level == 5 < max(wanted)
        }
        if max(wanted) >= 6:
            made[6] = convolved("output", coarser, made[5], 6)
        if max(wanted) == 7:
            made[7] = convolved("output", coarser, nn.relu(made[6]), 7)
        for level in self.levels:
            made[level] = minus_mean(made[level], level_size(valid_size, level))
        return tuple(made[level] for level in wanted)


def level_size(valid_size: ValidSize, level: int) -> ValidSize:
    """The valid region of a level's map; `valid_size` is that of the image in pixels."""
    return -(-valid_size // 2**level)
