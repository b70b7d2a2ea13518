"""The weights that training starts from, and the pixels that they expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
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


def check_pretrained(config: ConfigDict) -> None:
    """Raises UserError if `config.model.pretrained` is set but cannot be started from."""
    if config.model.pretrained:
        path = Path(config.model.pretrained)
        try:
            convention = load_config(path).model
        except UserError as error:
            raise UserError(f"config.model.pretrained: {error}") from error
        check_convention(config, convention, f"config.model.pretrained: {path}")


def with_pretrained(params: Any, frozen: Any, config: ConfigDict) -> tuple[Any, Any]:
    """Initial (params, frozen) with the weights of the checkpoint `config.model.pretrained`.

    A backbone must fit; offsets of deformable convolutions that the checkpoint does not have stay
    as they are. Of a complete detector, neck and head are taken too, array by array where path and
    shape are the same; what was taken, and what was not, is printed. Its memory belongs to other
    people and its optimizer to other losses: both start anew.

    Raises:
      UserError: there is no such checkpoint, or its backbone or its pixels are others.
    """
    check_pretrained(config)
    path = Path(config.model.pretrained)
    source = f"config.model.pretrained: {path}"
    arrays = load_arrays(path, lambda name: name.split("/")[0] in ("step", "params", "frozen"))
    step = int(arrays.pop("step"))
    backbone = {name: value for name, value in arrays.items() if "/backbone/" in name}
    params = _replaced({"params": params}, backbone, source)["params"]
    frozen = _replaced({"frozen": frozen}, backbone, source).get("frozen", {})  # may be empty
    others = {name: arrays[name] for name in arrays.keys() - backbone.keys()}
    if not others:
        return params, frozen
    taken, tree = _fitting({"params": params}, others)
    if jax.process_index() == 0:
        _print_taken(path, step, len(backbone), taken, others, {"params": params})
    return tree["params"], frozen


def _fitting(tree: Any, arrays: Mapping[str, np.ndarray]) -> tuple[list[str], Any]:
    """The names of the arrays that have a place of their shape in the tree, and it with them."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    taken = [
        name
        for name, value in arrays.items()
        if name in flat and np.shape(flat[name]) == value.shape
    ]
    flat.update({name: jnp.asarray(arrays[name]) for name in taken})
    return taken, traverse_util.unflatten_dict(flat, sep="/")


def _print_taken(
    path: Path,
    step: int,
    backbone: int,
    taken: Sequence[str],
    others: Mapping[str, np.ndarray],
    tree: Any,
) -> None:
    """What of a complete detector is used, and what is not."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    new = [name for name in flat if "/backbone/" not in name and name not in taken]
    left = sorted(others.keys() - set(taken))
    print(
        f"fine-tuning step {step} of {path}: {backbone} arrays of the backbone and {len(taken)} "
        "of neck and head are taken; lookup table, queue and optimizer start anew"
    )
    for what, names in (("not taken", left), ("starts anew", sorted(new))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"  {what}: {', '.join(names[:5])}{more}")


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
