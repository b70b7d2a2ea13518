"""The weights that training starts from, and the pixels that they expect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import load_arrays, load_config
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.nn.model import AlignPS, weights_template
from alignps_jax.types import UserError
from alignps_jax.weights.conventions import CAFFE, CONVENTIONS, Convention, with_convention
from alignps_jax.weights.download import fetch
from alignps_jax.weights.released_names import backbone_origin, by_our_names, is_detector
from alignps_jax.weights.sources import (
    FIELD,
    RANDOM,
    address_of,
    check_start,
    is_address,
    known_convention,
)
from alignps_jax.weights.tensor_files import listed, read_tensors

Arrays = Mapping[str, np.ndarray]


def starting_config(config: ConfigDict, workdir: Path, typed: Collection[str] = ()) -> ConfigDict:
    """`config` with the pixels and the stride of the weights that the run in `workdir` starts from.

    Weights at an address are downloaded. A run that is resumed keeps its own pixels and needs no
    weights. Process 0 decides.

    Raises:
      UserError: there are no such weights, they need PyTorch, nothing tells their pixels, or a
        `typed` field contradicts them.
    """
    own = {name: config.model[name] for name in CAFFE}

    def expected() -> Convention:
        if holds_checkpoint(workdir):
            stored = load_config(workdir, "latest").model
            kept = {name for name in CAFFE.keys() & stored if f"model.{name}" not in typed}
            return own | {name: stored[name] for name in kept}
        check_start(config)
        if config.model.pretrained == RANDOM:
            print(f"note: {FIELD} is 'random': training starts from random weights")
            return own
        found = _convention(config, typed)
        return {name: found[name] for name in CAFFE}

    found = broadcast_from_main(expected() if is_main_process() else None)  # tuples become lists
    found = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
    return with_convention(config, found, typed, f"{FIELD}={config.model.pretrained}")


def _place(config: ConfigDict) -> Path:
    """The run, step or file of the weights, downloaded if need be."""
    source = address_of(config.model.pretrained)
    return fetch(source) if is_address(source) else Path(source)


def _convention(config: ConfigDict, typed: Collection[str]) -> Convention:
    path, known = _place(config), known_convention(address_of(config.model.pretrained))
    if known:
        return CONVENTIONS[known]
    if not path.is_file():
        try:
            return load_config(path).model
        except UserError as error:
            raise UserError(f"{FIELD}: {error}") from error
    names = read_tensors(path).keys()
    known = "caffe" if is_detector(names) else backbone_origin(names)
    if known is None and "model.channel_order" in typed:
        known = "torchvision" if config.model.channel_order == "RGB" else "caffe"
    if known is None:
        raise UserError(
            f"{FIELD}: the names in {config.model.pretrained} do not tell what pixels this "
            "ResNet-50 was trained on: add --config.model.channel_order=RGB (torchvision, timm, "
            "DINO, MoCo, SwAV) or --config.model.channel_order=BGR (Caffe: MSRA, most of "
            "detectron2)"
        )
    return CONVENTIONS[known]


def starting_arrays(config: ConfigDict, model: AlignPS) -> Arrays | None:
    """The arrays of `config.model.pretrained` by their paths in the model; None for random weights.

    Arrays for which the model has no place keep the names of their file.

    Raises:
      UserError: they cannot be read, or are those of another backbone.
    """
    if config.model.pretrained == RANDOM:
        return None
    path, template = _place(config), weights_template(model)
    if path.is_file():
        paths = leaves_by_path({"params": template.params, "frozen": template.frozen})
        arrays = by_our_names(read_tensors(path), paths)
    else:
        wanted = ("params", "frozen")
        arrays = load_arrays(path, lambda name: name.split("/")[0] in wanted)
    with_weights(template.params, template.frozen, arrays, config.model.pretrained)
    return arrays


def with_weights(
    params: Any, frozen: Any, arrays: Arrays, source: str, *, say: bool = False
) -> tuple[Any, Any]:
    """(params, frozen) with the arrays of `starting_arrays` in their places.

    A backbone must fit; offsets of deformable convolutions that the weights do not have stay as
    they are. Of a complete detector, neck and head are taken too, array by array where path and
    shape are the same. Its memory belongs to other people and its optimizer to other losses: both
    start anew. With `say`, what is taken and what is not is printed.

    Raises:
      UserError: the weights of `source` are those of another backbone.
    """
    flat = leaves_by_path({"params": params, "frozen": frozen})
    fits = {
        name for name, array in arrays.items() if name in flat and flat[name].shape == array.shape
    }
    missing = [name for name in flat.keys() - fits if _in_backbone(name) and "/offset/" not in name]
    wrong = [name for name in arrays.keys() - fits if _in_backbone(name)]
    if wrong or missing:
        raise UserError(
            f"{FIELD}: {source}: another backbone than that of config.model; arrays are missing, "
            f"unexpected or of another shape: {listed([*wrong, *missing])}"
        )
    if say:
        backbone = sum(map(_in_backbone, fits))
        head = f" and {len(fits) - backbone} of neck and head" if len(fits) > backbone else ""
        print(
            f"{FIELD}: {backbone} arrays of the backbone{head} are taken from {source}; lookup "
            "table, queue and optimizer start anew"
        )
        others = arrays.keys() - fits
        anew = [name for name in flat.keys() - fits if not _in_backbone(name)]
        for what, names in (("not taken", others), ("starts anew", anew if others else ())):
            if names:
                print(f"  {what}: {listed(names)}")
    flat |= {name: jnp.asarray(arrays[name], flat[name].dtype) for name in fits}
    tree = traverse_util.unflatten_dict(flat, sep="/")
    return tree["params"], tree.get("frozen", {})


def _in_backbone(name: str) -> bool:
    return "/backbone/" in name or name.startswith("backbone.")
