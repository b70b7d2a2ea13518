"""Aligned feature aggregation (AFA; Paper, Sec. 3.2), and the feature pyramid it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.layers import conv, mask_padding, subtract_mean

FeatureMap = Float[Array, "B _ _ _"]  # [B, h, w, C], of sizes that differ from map to map
MakeConv = Callable[..., nn.Module]
# What a feature pyramid network has in place of a lateral and of an output deformable convolution.
xavier_uniform = nn.initializers.xavier_uniform()
plain_lateral = partial(conv, size=1, kernel_init=xavier_uniform)
plain_output = partial(conv, size=3, kernel_init=xavier_uniform)


def deformable(offset_gain: float, layer: Callable[..., nn.Module] = DeformConv) -> MakeConv:
    """Constructor of AFA's convolutions: offsets start as Xavier uniform times `offset_gain`."""
    if offset_gain == 0:
        return partial(layer, offset_kernel_init=nn.initializers.zeros)
    init = nn.initializers.variance_scaling(offset_gain**2, "fan_avg", "uniform")
    return partial(layer, offset_kernel_init=init)


def concatenate(
    lateral: Float[Array, "B h w C"], above: Float[Array, "B h w D"]
) -> Float[Array, "B h w C+D"]:
    """AFA's way to join a level with the ones above it: all channels side by side."""
    return jnp.concatenate([lateral, above], axis=-1)


def upsample_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    """Every pixel 2 x 2 times."""
    return x.repeat(2, axis=2).repeat(2, axis=1)


class AlignedFeatureAggregation(nn.Module):
    """C3, C4, C5 -> the maps P3 to P7 that are asked for.

    P3, P4 and P5 are lateral convolutions of C3, C4, C5, each joined with the ones above it, then
    an output convolution; P6 and P7 (FCOS) are convolutions of stride 2 of P5 and ReLU(P6). Only
    what the wanted levels need is made, parameters included.

    The spatial mean of each map of `levels` over the valid region is subtracted (Released code;
    gradients flow through it). In AlignPS the only one is P3: at once the map of embeddings and
    the input of the head.

    Attributes:
      features: channels of every lateral and of every P.
      levels: numbers of the maps to make, ascending in 3..7; level l has stride 2**l.
      background_levels: further ones, in training only (Released code: 4 to 7), mean and all.
      make_lateral, make_output: constructors of the convolutions (Paper: deformable both).
      join: puts a lateral map and what comes from above it together (Paper: concatenation).
    """

    features: int = 256
    levels: tuple[int, ...] = (3,)
    background_levels: tuple[int, ...] = ()
    make_lateral: MakeConv = DeformConv
    make_output: MakeConv = DeformConv
    join: Callable[[FeatureMap, FeatureMap], FeatureMap] = concatenate
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, maps: Sequence[FeatureMap], valid_size: Int[Array, "B 2"], *, train: bool
    ) -> tuple[FeatureMap, ...]:
        """Aggregates C3, C4, C5; `valid_size` is the valid region of the image in pixels.

        Returns the maps of `levels`, then, in training, those of `background_levels`; zero
        outside the valid region.
        """
        wanted = self.levels
        # Initialization makes all parameters, so that training and inference have the same ones.
        if train or self.is_initializing():
            wanted += self.background_levels
        made = self._pyramid(maps, valid_size, wanted)
        return tuple(
            subtract_mean(made[level], level_size(valid_size, level))
            if level in self.levels
            else made[level]
            for level in wanted
        )

    def _pyramid(
        self, maps: Sequence[FeatureMap], valid_size: Int[Array, "B 2"], wanted: Sequence[int]
    ) -> dict[int, FeatureMap]:
        """The wanted levels, and those that they are made from, before the mean subtraction."""
        levels = range(min(*wanted, 5), 6)
        # Laterals give every level as many channels, and move what they read (alignment).
        laterals = {
            level: self._conv(
                self.make_lateral, f"lateral{level}", maps[level - 3], level, valid_size
            )
            for level in levels
        }
        # From the top down, what lies above joins each level: context for embeddings (Sec. 3.2).
        top = {5: laterals[5]}
        for level in reversed(levels[:-1]):
            top[level] = self.join(laterals[level], upsample_nearest(top[level + 1]))
        # Output convolutions bring the joined channels back to `features`.
        outputs = {level for level in wanted if level < 5} | ({5} if max(wanted) >= 5 else set())
        made = {
            level: self._conv(self.make_output, f"output{level}", top[level], level, valid_size)
            for level in sorted(outputs)
        }
        coarser = partial(conv, size=3, stride=2, use_bias=True, kernel_init=xavier_uniform)
        if max(wanted) >= 6:
            made[6] = self._conv(coarser, "output6", made[5], 6, valid_size)
        if max(wanted) == 7:
            made[7] = self._conv(coarser, "output7", nn.relu(made[6]), 7, valid_size)
        return made

    def _conv(
        self, make: MakeConv, name: str, x: FeatureMap, level: int, valid_size: Int[Array, "B 2"]
    ) -> FeatureMap:
        layer = make(self.features, dtype=self.dtype, name=name)
        return mask_padding(layer(x), level_size(valid_size, level))


def level_size(valid_size: Int[Array, "B 2"], level: int) -> Int[Array, "B 2"]:
    """The valid region of a level's map; `valid_size` is that of the image in pixels."""
    return -(-valid_size // 2**level)
