"""AlignPS = backbone -> neck -> head, and how a configuration becomes one."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from alignps_jax.nn.backbone import ResNet50, ResNetSmall
from alignps_jax.nn.convolution import Map
from alignps_jax.nn.head import FCOSHead
from alignps_jax.nn.layers import GroupNorm, ValidSize, mask_padding, round_up
from alignps_jax.nn.neck import AlignedFeatureAggregation, level_size
from alignps_jax.nn.roi import MutualInformation, RoIHead, RPNHead
from alignps_jax.types import Outputs, Weights

Params = Any


class AlignPS(nn.Module):
    """Person search in one stage: boxes, scores and embeddings of every location.

    With `roi` it is ROI-AlignPS, which embeds regions, too.
    `channel_order`, `pixel_mean` and `pixel_std` are those that the backbone's weights expect.
    """

    backbone: nn.Module
    neck: nn.Module
    head: nn.Module
    channel_order: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    dtype: str = "float32"
    roi: Any = None
    rpn: Any = RPNHead()
    mutual_information: Any = MutualInformation()

    def __call__(
        self, image: UInt8[Array, "B H W 3"], size: ValidSize, *, train: bool = False
    ) -> tuple[Outputs, ...]:
        """The outputs of each level of `predicted_levels(train)`.

        Args:
          image: RGB bytes; height and width are multiples of 32.
          size: height and width of each photo in its image.
          train: also predict on the levels that only training uses.
        """
        return self.with_c4(image, size, train=train)[0]

    def with_c4(
        self, image: UInt8[Array, "B H W 3"], size: ValidSize, *, train: bool = False
    ) -> tuple[tuple[Outputs, ...], tuple[Map, ValidSize] | None]:
        """The same, and C4 with its valid size if there is an RoI branch."""
        valid_size = round_up(size)
        pixels = self.normalized(image, size).astype(self.dtype)
        features = self.backbone(pixels, valid_size)
        maps = self.neck(features, valid_size, train=train)
        # Initialisation runs the head on all levels, so that all parameters are made.
        levels = self.predicted_levels(train or self.is_initializing())
        outputs = tuple(
            self.head(level_map, level_size(valid_size, level), level)
            for level_map, level in zip(maps, levels, strict=True)
        )
        c4 = (features[1], level_size(valid_size, 4)) if self.roi else None
        if c4 and self.is_initializing():  # with a box in each image
            boxes, valid = jnp.full((len(image), 1, 4), 8.0), jnp.ones((len(image), 1), bool)
            embeddings = self.roi(*c4, boxes, valid).embeddings[:, 0]
            self.rpn(*c4)
            self.mutual_information(embeddings, embeddings)
        return outputs, c4

    def normalized(
        self, image: UInt8[Array, "B H W 3"], size: ValidSize
    ) -> Float[Array, "B H W 3"]:
        """RGB bytes to normalized float32, zero beyond each photo's own `size`."""
        pixels = image[..., ::-1] if self.channel_order == "BGR" else image
        pixels = pixels.astype(jnp.float32) - jnp.array(self.pixel_mean)
        return mask_padding(pixels / jnp.array(self.pixel_std), size)

    def predicted_levels(self, train: bool) -> tuple[int, ...]:
        """Numbers of the levels that are predicted on; those of training only come last."""
        return self.neck.levels + (self.neck.background_levels if train else ())

    def strides(self, train: bool) -> tuple[int, ...]:
        """Pixels between the locations of each level of `predicted_levels(train)`."""
        return tuple(2**level for level in self.predicted_levels(train))


def build_model(config: ConfigDict) -> AlignPS:
    """The network that a checked configuration describes."""
    model = config.model
    background_levels = (4, 5, 6, 7) if model.background_levels else ()
    everywhere = {"remat": model.remat, "dtype": model.dtype}
    backbones = {
        "resnet50": partial(ResNet50, stride_in_blocks=model.stride_in_3x3),
        "resnet_small": partial(ResNetSmall, norm=partial(GroupNorm, groups=model.norm_groups)),
    }
    backbone = backbones[model.backbone](
        width=model.backbone_width,
        frozen_stages=model.frozen_stages,
        deform_stages=model.deform_stages,
        **everywhere,
    )
    last_stage = partial(backbone.clone(deform_stages=()).stage, len(backbone.depths) - 1)
    return AlignPS(
        backbone=backbone,
        neck=AlignedFeatureAggregation(
            model.channels,
            levels=model.levels,
            background_levels=background_levels,
            lateral_deform=model.lateral_deform,
            output_deform=model.output_deform,
            concatenate=model.concatenate,
            offset_gain=model.offset_gain,
            **everywhere,
        ),
        head=FCOSHead(
            model.channels,
            model.head_convs,
            model.norm_groups,
            levels=model.levels + background_levels,
            reid=model.reid,
            initial_distance=model.initial_distance,
            **everywhere,
        ),
        channel_order=model.channel_order,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        dtype=model.dtype,
        roi=RoIHead(last_stage, model.channels) if model.roi else None,
    )


def init_variables(model: AlignPS, rng: Array) -> tuple[Params, Params]:
    """Initial (params, frozen) of a model."""
    # It runs once: on CPUs most of its time is its compilation, which takes a third then.
    quickly = jax.default_backend() == "cpu" and not isinstance(rng, jax.core.Tracer)
    options = {"xla_backend_optimization_level": 1} if quickly else None
    init = jax.jit(partial(model.init, train=True), compiler_options=options)
    variables = init(rng, jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.full((1, 2), 64, jnp.int32))
    return variables["params"], variables.get("frozen", {})


def weights_template(model: AlignPS) -> Weights:
    """Shapes and dtypes of what a checkpoint of `model` holds for inference."""
    return jax.eval_shape(lambda: Weights(jnp.int32(0), *init_variables(model, jax.random.key(0))))
