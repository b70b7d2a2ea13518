"""AlignPS = backbone -> neck -> head, and how a configuration becomes one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from alignps_jax.backbone import BottleneckBlock, ResNet50, ResNetSmall
from alignps_jax.head import FCOSHead
from alignps_jax.layers import GroupNorm, hold_zero, valid_extent
from alignps_jax.neck import AlignedFeatureAggregation
from alignps_jax.types import Outputs, UserError, Weights

STRIDES = (8, 16, 32, 64, 128)
Params = Any


@dataclasses.dataclass(frozen=True)
class InputConvention:
    """What the backbone's weights expect of a pixel; mean and std in `channel_order`."""

    channel_order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalize(
        self, image: UInt8[Array, "B H W 3"], size: Int[Array, "B 2"]
    ) -> Float[Array, "B H W 3"]:
        """RGB bytes to normalised float32, zero beyond each photo's own `size`."""
        pixels = image[..., ::-1] if self.channel_order == "BGR" else image
        pixels = (pixels.astype(jnp.float32) - jnp.array(self.mean)) / jnp.array(self.std)
        return hold_zero(pixels, size)


class AlignPS(nn.Module):
    """Person search in one stage: boxes, scores and embeddings of every location.

    Attributes:
      backbone, neck, head: see the modules of the same names.
      convention: what a pixel becomes before the backbone.
    """

    backbone: nn.Module
    neck: nn.Module
    head: nn.Module
    convention: InputConvention
    dtype: str = "float32"

    def __call__(
        self, image: UInt8[Array, "B H W 3"], size: Int[Array, "B 2"], *, train: bool = False
    ) -> tuple[Outputs, ...]:
        """Runs the network on RGB images padded into one bucket.

        Args:
          image: RGB bytes; height and width are multiples of 32.
          size: valid height and width of each image.
          train: also predict on the levels that only training uses.

        Returns:
          The outputs of each level, strides 8, 16, ...
        """
        extent = valid_extent(size)
        pixels = self.convention.normalize(image, size).astype(self.dtype)
        levels = self.neck(self.backbone(pixels, extent), extent, train=train)
        return tuple(
            self.head(level, -(-extent // STRIDES[index]), index)
            for index, level in enumerate(levels)
        )


def _choose(table: dict[str, Any], field: str, name: str) -> Any:
    if name not in table:
        raise UserError(f"{field}: found {name!r}, expected one of {', '.join(table)}")
    return table[name]


BACKBONES = {
    "resnet50": lambda model: partial(
        ResNet50, block=partial(BottleneckBlock, stride_in_3x3=model.stride_in_3x3)
    ),
    "resnet_small": lambda model: partial(
        ResNetSmall, norm=partial(GroupNorm, groups=model.norm_groups)
    ),
}


def build_model(config: ConfigDict) -> AlignPS:
    """The network of a whole configuration.

    Raises:
      UserError: a field of `config.model` names something that does not exist.
    """
    model = config.model
    dtype = _choose(
        {"float32": "float32", "bfloat16": "bfloat16"}, "config.model.dtype", model.dtype
    )
    backbone = _choose(BACKBONES, "config.model.backbone", model.backbone)(model)
    _choose({"BGR": 0, "RGB": 0}, "config.model.channel_order", model.channel_order)
    return AlignPS(
        backbone=backbone(
            width=model.backbone_width,
            frozen_stages=model.frozen_stages,
            deform_stages=tuple(model.deform_stages),
            dtype=dtype,
        ),
        neck=AlignedFeatureAggregation(
            model.channels,
            offset_gain=model.offset_gain,
            background_levels=model.background_levels,
            dtype=dtype,
        ),
        head=FCOSHead(
            model.channels,
            model.head_convs,
            model.norm_groups,
            num_levels=len(STRIDES) if model.background_levels else 1,
            initial_distance=model.initial_distance,
            dtype=dtype,
        ),
        convention=InputConvention(
            model.channel_order, tuple(model.pixel_mean), tuple(model.pixel_std)
        ),
        dtype=dtype,
    )


def init_variables(model: AlignPS, rng: Array) -> tuple[Params, Params]:
    """Initial (params, frozen) of a model."""
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    size = jnp.full((1, 2), 64, jnp.int32)
    variables = jax.jit(partial(model.init, train=True))(rng, image, size)
    return variables["params"], variables.get("frozen", {})


def weights_template(model: AlignPS) -> Weights:
    """Shapes and dtypes of what a checkpoint of `model` holds for inference."""
    params, frozen = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return Weights(jax.ShapeDtypeStruct((), jnp.int32), params, frozen)
