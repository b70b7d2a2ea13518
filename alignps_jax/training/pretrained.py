"""The weights that training starts from, and the pixels that they expect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.places import holds_checkpoint, last_step
from alignps_jax.checkpoint.store import load_arrays, load_config
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.errors import blame
from alignps_jax.nn.model import AlignPS, weights_template
from alignps_jax.types import UserError
from alignps_jax.weights import sources
from alignps_jax.weights.released_names import by_our_names, kind_of
from alignps_jax.weights.sources import (
    CAFFE,
    FIELD,
    RANDOM,
    Convention,
    convention_of,
    with_convention,
)
from alignps_jax.weights.tensor_files import listed, read_tensors

Arrays = Mapping[str, np.ndarray]


def starting_config(config: ConfigDict, workdir: Path, typed: Collection[str] = ()) -> ConfigDict:
    """`config` with the pixels and the stride of the weights that the run in `workdir` starts from.

    Weights at an address are downloaded. A run that is resumed keeps its own pixels and needs no
    weights. Process 0 decides.

    Raises UserError if there are no such weights, they need PyTorch, nothing tells their pixels, or
    a `typed` field contradicts them.
    """
    found = broadcast_from_main(_convention(config, workdir, typed) if is_main_process() else None)
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}  # JSON
    return with_convention(config, fields, typed, f"{FIELD}={config.model.pretrained}")


def _convention(config: ConfigDict, workdir: Path, typed: Collection[str]) -> Convention:
    """The fields of `CAFFE` as the weights expect them."""
    own = {name: config.model[name] for name in CAFFE}
    if holds_checkpoint(workdir):
        stored = load_config(last_step(workdir)).model
        return own | {n: stored[n] for n in own if n in stored and f"model.{n}" not in typed}
    sources.check_start(config)
    if config.model.pretrained == RANDOM:
        print(f"note: {FIELD} is 'random': training starts from random weights")
        return own
    path = _place(config)
    if not path.is_file():
        stored = load_config(path).model
        return {name: stored[name] for name in own}
    source = config.model.pretrained
    with blame(f"{FIELD}: {source}"):
        return convention_of(read_tensors(path), sources.address_of(source), config, typed)


def _place(config: ConfigDict) -> Path:
    """The run, step or file of the weights, downloaded if need be."""
    source = sources.address_of(config.model.pretrained)
    return sources.fetch(source) if sources.is_address(source) else Path(source)


def starting_arrays(config: ConfigDict, model: AlignPS) -> Arrays | None:
    """The arrays of `config.model.pretrained` by their paths in the model; None for random weights.

    A backbone must fit; offsets of deformable convolutions may be missing. Of a complete detector,
    neck and head are taken too, array by array where path and shape are the same. Its memory
    belongs to other people and its optimizer to other losses: both start anew.

    Raises UserError if they cannot be read, or are those of another backbone.
    """
    source = config.model.pretrained
    if source == RANDOM:
        return None
    path, template = _place(config), weights_template(model)
    places = leaves_by_path({"params": template.params, "frozen": template.frozen})
    if path.is_file():
        with blame(f"{FIELD}: {source}"):
            tensors = read_tensors(path)
            arrays, kind = by_our_names(tensors, places), kind_of(tensors)
    else:
        arrays = load_arrays(path, lambda name: name.startswith(("params/", "frozen/")))
        kind = "a checkpoint"
    # The RoI branch starts with a copy of the backbone's last stage, unless it has its own.
    copies = {n: n.replace("/roi/", "/backbone/") for n in places if "/roi/layer4_" in n}
    arrays = {n: arrays[of] for n, of in copies.items() if of in arrays} | arrays
    fits = {n: x for n, x in arrays.items() if n in places and places[n].shape == x.shape}
    anew, others = ([n for n in names if n not in fits] for names in (places, arrays))
    missing = [name for name in anew if "/offset/" not in name]
    if wrong := [*filter(_in_backbone, others), *filter(_in_backbone, missing)]:
        raise UserError(
            f"{FIELD}: {source}: another backbone than that of config.model; arrays are missing, "
            f"unexpected or of another shape: {listed(wrong)} ({kind})"
        )
    if is_main_process():
        backbone, new = sum(map(_in_backbone, fits)), ["lookup table, queue, optimizer", *anew]
        print(
            f"{FIELD}: {len(fits)} arrays ({backbone} of the backbone) are taken from {source}; "
            f"not taken: {listed(others) or 'none'}; starts anew: {listed(new)}"
        )
    return fits


def _in_backbone(name: str) -> bool:
    return "/backbone/" in name or name.startswith("backbone.")
