"""The pixels that published weights were trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.types import UserError
from alignps_jax.weights.released_names import is_detector
from alignps_jax.weights.sources import known_convention

Convention = Mapping[str, Any]  # the fields of `config.model` in `CONVENTIONS`

# What the weights of each origin expect of a pixel, as fields of `config.model`.
CAFFE = {
    "channel_order": "BGR",
    "pixel_mean": (103.530, 116.280, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "stride_in_3x3": False,
}
TORCHVISION = {
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.280, 103.530),
    "pixel_std": (58.395, 57.120, 57.375),
    "stride_in_3x3": True,
}
CONVENTIONS: dict[str, dict[str, Any]] = {"torchvision": TORCHVISION, "caffe": CAFFE}


def convention_of(
    names: Collection[str], source: str, config: ConfigDict, typed: Collection[str]
) -> Convention:
    """The pixels that the tensors of these names expect.

    The digits in the name of the file or address `source` tell; then a detector; then the channel
    order, if the user `typed` it. Then torchvision and timm deliver their classifier with a ResNet,
    and only Caffe's has a bias in its first convolution; DINO, MoCo and SwAV have neither.

    Raises:
      ValueError: nothing tells.
    """
    if known := known_convention(source):
        return CONVENTIONS[known]
    if is_detector(names):
        return CAFFE
    if "model.channel_order" in typed:
        return TORCHVISION if config.model.channel_order == "RGB" else CAFFE
    if "conv1.bias" in names:
        return CAFFE
    if {"fc.weight", "conv1.weight"} <= set(names):
        return TORCHVISION
    raise ValueError(
        "the names do not tell what pixels this ResNet-50 was trained on: add "
        "--config.model.channel_order=RGB (torchvision, timm, DINO, MoCo, SwAV) or BGR "
        "(Caffe: MSRA, most of detectron2)"
    )


def with_convention(
    config: ConfigDict, expected: Convention, typed: Collection[str], source: str
) -> ConfigDict:
    """A copy of `config` whose pixels and stride are those that the weights of `source` expect.

    Raises:
      UserError: a field that the user `typed` (dotted names) contradicts the weights.
    """
    config = config.copy_and_resolve_references()
    wrong = [
        f"config.model.{name}: found {config.model[name]!r}, expected {expected[name]!r}"
        for name in CAFFE
        if f"model.{name}" in typed and config.model[name] != expected[name]
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)} for {source}; without these flags, it follows")
    with config.unlocked():
        config.model.update({name: expected[name] for name in CAFFE})
    return config
