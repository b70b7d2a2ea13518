"""The weights that a backbone starts from, and the pixels that they expect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import load_arrays, load_config
from alignps_jax.types import UserError

# The fields of `config.model` that belong to a backbone's weights.
CONVENTION_FIELDS = ("channel_order", "pixel_mean", "pixel_std", "stride_in_3x3")


def check_convention(config: ConfigDict, expected: Mapping[str, Any], source: str) -> None:
    """Raises UserError unless `config.model` feeds a backbone the pixels it was trained on."""
    wrong = [name for name in CONVENTION_FIELDS if config.model[name] != expected[name]]
    if wrong:
        found = "; ".join(
            f"config.model.{name}: found {config.model[name]!r}, expected {expected[name]!r}"
            for name in wrong
        )
        flags = " ".join(
            f"--config.model.{name}={str(expected[name]).replace(' ', '')!r}" for name in wrong
        )
        raise UserError(f"{found} for {source} (set {flags})")


def with_pretrained_backbone(params: Any, frozen: Any, config: ConfigDict) -> tuple[Any, Any]:
    """Initial (params, frozen) with the backbone of the checkpoint `config.model.pretrained`.

    Offsets of deformable convolutions that the checkpoint does not have stay as they are.

    Raises:
      UserError: there is no such checkpoint, or its backbone or its pixels are others.
    """
    path = Path(config.model.pretrained)
    source = f"config.model.pretrained: {path}"
    check_convention(config, load_config(path).model, source)
    arrays = load_arrays(path, lambda name: "/backbone/" in name)
    return (
        _replaced({"params": params}, arrays, source)["params"],
        _replaced({"frozen": frozen}, arrays, source)["frozen"],
    )


def _replaced(tree: Any, arrays: Mapping[str, np.ndarray], source: str) -> Any:
    """The tree (under its collection's name) with the arrays in their places."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    (collection,) = tree
    found = {name: value for name, value in arrays.items() if name.startswith(f"{collection}/")}
    expected = {
        name: np.shape(value)
        for name, value in flat.items()
        if "/backbone/" in name and (name in found or "/offset/" not in name)
    }
    wrong = [
        name
        for name in expected | found
        if name not in found or expected.get(name) != found[name].shape
    ]
    if wrong:
        raise UserError(
            f"{source}: another backbone than that of config.model; {len(wrong)} arrays are "
            f"missing, unexpected or of another shape, such as {', '.join(wrong[:3])}"
        )
    flat.update({name: jnp.asarray(value) for name, value in found.items()})
    return traverse_util.unflatten_dict(flat, sep="/")
