"""The FCOS head: box, centerness and person score at every location (paper section 3.1)."""

from __future__ import annotations

import math
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from alignps_jax.deform_conv import ModulatedDeformConv
from alignps_jax.layers import GroupNorm, conv, hold_zero, valid_mask
from alignps_jax.types import Outputs

normal = nn.initializers.normal(0.01)
# Every location starts as a person with a probability of 1% (focal loss paper).
PRIOR_BIAS = -math.log(99.0)


class Tower(nn.Module):
    """`num_convs` 3x3 convolutions with group norm and ReLU, the last one deformable (DCNv2)."""

    features: int
    num_convs: int
    norm_groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w D"], extent: Int[Array, "B 2"]
    ) -> Float[Array, "B h w C"]:
        for index in range(self.num_convs):
            name = f"conv{index}"
            if index == self.num_convs - 1:
                layer = ModulatedDeformConv(
                    self.features, use_bias=True, dtype=self.dtype, name=name
                )
            else:
                layer = conv(
                    self.features,
                    3,
                    use_bias=True,
                    kernel_init=normal,
                    dtype=self.dtype,
                    name=name,
                )
            x = nn.relu(GroupNorm(self.norm_groups, name=f"norm{index}")(layer(x), extent))
        return x


class FCOSHead(nn.Module):
    """Two towers shared by all levels; predictions in float32.

    Box distances start around `initial_distance` strides (released code: 0, where ReLU lets only
    half of them learn at first).

    The embeddings of a level are its input: "re-id first" (paper section 3.2).
    """

    features: int = 256
    num_convs: int = 4
    norm_groups: int = 32
    num_levels: int = 1
    initial_distance: float = 0.0
    dtype: str = "float32"

    def setup(self) -> None:
        tower = partial(Tower, self.features, self.num_convs, self.norm_groups, dtype=self.dtype)
        self.cls_tower = tower()
        self.box_tower = tower()
        predictor = partial(conv, size=3, use_bias=True, kernel_init=normal, dtype=jnp.float32)
        self.cls_predictor = predictor(1, bias_init=nn.initializers.constant(PRIOR_BIAS))
        self.box_predictor = predictor(4, bias_init=nn.initializers.constant(self.initial_distance))
        self.centerness_predictor = predictor(1)
        self.scales = [
            self.param(f"scale{level}", nn.initializers.ones, (), jnp.float32)
            for level in range(self.num_levels)
        ]

    def __call__(
        self, x: Float[Array, "B h w D"], extent: Int[Array, "B 2"], level: int = 0
    ) -> Outputs:
        """Predicts on one level, zero outside its valid `extent` (in locations)."""
        cls = self.cls_tower(x, extent)
        box = self.box_tower(x, extent)
        distances = nn.relu(self.scales[level] * self.box_predictor(box))
        return Outputs(
            cls_logits=self.cls_predictor(cls)[..., 0],
            box_distances=hold_zero(distances, extent),
            centerness_logits=self.centerness_predictor(box)[..., 0],
            embeddings=x.astype(jnp.float32),
            valid=valid_mask(extent, x.shape[1], x.shape[2]),
        )
