"""The FCOS head: box, centerness and person score at every location (Paper, Sec. 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from alignps_jax.nn.deform_conv import ModulatedDeformConv
from alignps_jax.nn.layers import GroupNorm, conv, mask_padding, subtract_mean, valid_mask
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
        self, x: Float[Array, "B h w D"], valid_size: Int[Array, "B 2"]
    ) -> Float[Array, "B h w C"]:
        for index in range(self.num_convs):
            name = f"conv{index}"
            if index == self.num_convs - 1:
                layer: nn.Module = ModulatedDeformConv(
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
            x = nn.relu(GroupNorm(self.norm_groups, name=f"norm{index}")(layer(x), valid_size))
        return x


@struct.dataclass
class HeadMaps:
    """What embeddings can be made from: the head's input and the output of its two towers."""

    input: Float[Array, "B h w D"]
    regression: Float[Array, "B h w C"]
    classification: Float[Array, "B h w C"]


def input_embedding(maps: HeadMaps, valid_size: Int[Array, "B 2"]) -> Float[Array, "B h w D"]:
    """The head's input as it is: "re-id first" (Paper, Sec. 3.2)."""
    del valid_size  # the input is zero outside of it
    return maps.input.astype(jnp.float32)


class PredictedEmbedding(nn.Module):
    """Embeddings by a linear 3x3 convolution of what `select` takes from the head (Fig. 6).

    Less their spatial mean, as those of `input_embedding` are, whence no bias.

    Attributes:
      features: dimension of the embeddings.
      select: the head's map to start from.
      tower: what comes before the linear convolution; called on (map, valid_size).
    """

    features: int
    select: Callable[[HeadMaps], Float[Array, "B h w C"]]
    tower: Callable[..., Float[Array, "B h w C"]] = lambda x, valid_size: x

    @nn.compact
    def __call__(
        self, maps: HeadMaps, valid_size: Int[Array, "B 2"]
    ) -> Float[Array, "B h w {self.features}"]:
        x = self.tower(self.select(maps), valid_size)
        predictor = conv(self.features, 3, kernel_init=normal, dtype=jnp.float32, name="predictor")
        return subtract_mean(mask_padding(predictor(x), valid_size), valid_size)


class FCOSHead(nn.Module):
    """Two towers shared by all levels; predictions in float32.

    Box distances start around `initial_distance` strides (Released code: 0, where ReLU lets only
    half of them learn at first).

    Attributes:
      features: channels of the towers.
      num_convs, norm_groups: of each tower.
      make_tower: constructor of a tower.
      levels: numbers of the levels that it is run on; each has a scale of its own.
      embed: makes the embeddings of a level, called on (HeadMaps, valid_size).
    """

    features: int = 256
    num_convs: int = 4
    norm_groups: int = 32
    make_tower: Callable[..., nn.Module] = Tower
    levels: tuple[int, ...] = (3,)
    embed: Callable[..., Float[Array, "B h w D"]] = input_embedding
    initial_distance: float = 0.0
    dtype: str = "float32"

    def setup(self) -> None:
        tower = partial(
            self.make_tower, self.features, self.num_convs, self.norm_groups, dtype=self.dtype
        )
        self.cls_tower = tower()
        self.box_tower = tower()
        predictor = partial(conv, size=3, use_bias=True, kernel_init=normal, dtype=jnp.float32)
        self.cls_predictor = predictor(1, bias_init=nn.initializers.constant(PRIOR_BIAS))
        self.box_predictor = predictor(4, bias_init=nn.initializers.constant(self.initial_distance))
        self.centerness_predictor = predictor(1)
        # Numbered from P3, as in the released weights.
        self.scales = {
            level: self.param(f"scale{level - 3}", nn.initializers.ones, (), jnp.float32)
            for level in self.levels
        }

    def __call__(
        self, x: Float[Array, "B h w D"], valid_size: Int[Array, "B 2"], level: int = 3
    ) -> Outputs:
        """Predicts on one level, zero outside its valid `valid_size` (in locations)."""
        cls = self.cls_tower(x, valid_size)
        box = self.box_tower(x, valid_size)
        distances = nn.relu(self.scales[level] * self.box_predictor(box))
        return Outputs(
            cls_logits=self.cls_predictor(cls)[..., 0],
            box_distances=mask_padding(distances, valid_size),
            centerness_logits=self.centerness_predictor(box)[..., 0],
            embeddings=self.embed(HeadMaps(x, box, cls), valid_size),
            valid=valid_mask(valid_size, x.shape[1], x.shape[2]),
        )
