"""The FCOS head: box, centerness and person score at every location (Paper, Sec. 3.1)."""

from __future__ import annotations

import math
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from alignps_jax.nn.convolution import Map
from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.layers import GroupNorm, ValidSize, conv, mask_padding, minus_mean, valid_mask
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
    def __call__(self, x: Map, valid_size: ValidSize) -> Float[Array, "B h w C"]:
        plain = partial(conv, size=3, kernel_init=normal)
        last = partial(DeformConv, modulated=True)
        for index in range(self.num_convs):
            make = last if index == self.num_convs - 1 else plain
            x = make(self.features, use_bias=True, dtype=self.dtype, name=f"conv{index}")(x)
            x = nn.relu(GroupNorm(self.norm_groups, name=f"norm{index}")(x, valid_size))
        return x


class FCOSHead(nn.Module):
    """Two towers shared by all levels; predictions in float32.

    Attributes:
      features: channels of the towers and of embeddings.
      num_convs, norm_groups: of each tower.
      levels: numbers of the levels that it is run on; each has a scale of its own.
      reid: where embeddings come from: "input" takes the head's input as it is ("re-id first",
        Sec. 3.2); "regression", "classification" and "independent" predict them from a tower.
      initial_distance: box distances start around this many strides (Released code: 0).
      remat: the backward pass computes the towers again.
    """

    features: int
    num_convs: int
    norm_groups: int
    levels: tuple[int, ...] = (3,)
    reid: str = "input"
    initial_distance: float = 0.0
    remat: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        make = nn.remat(Tower) if self.remat else Tower
        tower = partial(make, self.features, self.num_convs, self.norm_groups, dtype=self.dtype)
        self.cls_tower, self.box_tower = tower(), tower()
        predictor = partial(conv, size=3, use_bias=True, kernel_init=normal, dtype=jnp.float32)
        self.cls_predictor = predictor(1, bias_init=nn.initializers.constant(PRIOR_BIAS))
        self.box_predictor = predictor(4, bias_init=nn.initializers.constant(self.initial_distance))
        self.centerness_predictor = predictor(1)
        if self.reid != "input":
            self.embed_predictor = conv(self.features, 3, kernel_init=normal, dtype=jnp.float32)
        if self.reid == "independent":
            self.embed_tower = tower()
        # Numbered from P3, as in the released weights.
        self.scales = {
            level: self.param(f"scale{level - 3}", nn.initializers.ones, (), jnp.float32)
            for level in self.levels
        }

    def __call__(self, x: Map, valid_size: ValidSize, level: int = 3) -> Outputs:
        """Predicts on one level, zero outside its valid `valid_size` (in locations)."""
        cls, box = self.cls_tower(x, valid_size), self.box_tower(x, valid_size)
        distances = nn.relu(self.scales[level] * self.box_predictor(box))
        if self.reid == "input":
            embeddings = x.astype(jnp.float32)
        else:
            # Fig. 6: less their spatial mean, as those of the head's input are; whence no bias.
            towers = {"regression": box, "classification": cls}
            tower = towers[self.reid] if self.reid in towers else self.embed_tower(x, valid_size)
            embeddings = mask_padding(self.embed_predictor(tower), valid_size)
            embeddings = minus_mean(embeddings, valid_size)
        return Outputs(
            cls_logits=self.cls_predictor(cls)[..., 0],
            box_distances=mask_padding(distances, valid_size),
            centerness_logits=self.centerness_predictor(box)[..., 0],
            embeddings=embeddings,
            valid=valid_mask(valid_size, x.shape[1], x.shape[2]),
        )
