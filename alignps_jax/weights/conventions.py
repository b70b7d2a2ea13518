"""The pixels that published weights were trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.types import UserError

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
