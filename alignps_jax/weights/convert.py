"""Published PyTorch weights to checkpoints of ours, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.arrays import mismatch
from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.checkpoint.places import CHECKPOINTS, chosen_step
from alignps_jax.checkpoint.store import (
    RUN_CONFIG,
    Checkpoints,
    load_arrays,
    load_config,
    write_run_info,
)
from alignps_jax.errors import blame
from alignps_jax.files import check_outputs
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.types import OIMMemory, TrainState, UserError
from alignps_jax.weights.released_names import (
    LOOKUP_TABLE,
    TAIL,
    by_our_names,
    is_detector,
    kind_of,
    released_name,
    to_torch,
    unread_memories,
)
from alignps_jax.weights.sources import convention_of, with_convention
from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors


def convert_released(
    config: ConfigDict,
    source: Path,
    workdir: Path,
    typed: Collection[str] = (),
    averaged: bool = False,
) -> None:
    """Writes a checkpoint (step 0) with the weights of a PyTorch file to `workdir`.

    A released detector becomes a complete checkpoint, memory included, as training writes them; an
    ImageNet ResNet-50 one of the backbone only, for `config.model.pretrained`. With `averaged` it
    is the running average that a training checkpoint holds. The checkpoint's configuration gets the
    pixels that the weights expect; `typed` are the dotted names of the fields that the user set.

    Raises UserError, and writes nothing, if the file cannot be read, is neither of the two, does
    not fit `config` or tell its pixels, or there are checkpoints in `workdir` already.
    """
    if (workdir / CHECKPOINTS).exists():
        raise UserError(f"--workdir: found checkpoints in {workdir}, expected none")
    check_outputs(*(workdir / name for name in (CHECKPOINTS, RUN_CONFIG)))
    with blame(source):
        tensors = read_tensors(source, averaged)
        state = _state(config, tensors)
        expected = convention_of(tensors, str(source), config, typed)
    config = with_convention(config, expected, typed, str(source))
    keep = config.train.keep_checkpoints
    with one_writer(workdir), Checkpoints(workdir, keep=keep, config=config) as checkpoints:
        checkpoints.save(state, None)
    write_run_info(workdir, config)
    print(f"{len(tensors)} tensors of {source} are now in {workdir}")


def export_released(checkpoint: Path, target: Path, config: ConfigDict | None = None) -> None:
    """Writes the chosen step of a workdir, or one step's folder, in the released naming.

    `config` goes into the file as its metadata (None: the checkpoint's own).

    Raises UserError if it holds a backbone only, or `target` is a folder.
    """
    check_outputs(target)
    config = config or load_config(checkpoint)
    folder, by = chosen_step(checkpoint, config)
    kept = ("step", "params/", "frozen/", "memory/", "roi_memory/")
    arrays = load_arrays(folder, lambda name: name.startswith(kept))
    step = int(arrays.pop("step"))
    if "memory/lut" not in arrays:
        raise UserError(f"{checkpoint}: holds a backbone only, expected a whole AlignPS")
    is_roi = arrays.pop("roi_memory/tail", None) is not None  # released files do not hold it
    tensors = unread_memories(arrays["memory/lut"].shape[1]) if is_roi else {}
    tensors |= {released_name(name): to_torch(array, name) for name, array in arrays.items()}
    tensors[TAIL] = tensors[TAIL].astype(np.int64)
    for name in [name for name in tensors if name.endswith(".running_var")]:
        tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    about = {"exported_by": "alignps_jax", "step": str(step), "chosen_by": by}
    write_tensors(target, tensors, {**about, "config": config.to_json()})
    print(f"{len(tensors)} tensors of step {step} of {checkpoint} (chosen by {by}): {target}")


def _state(config: ConfigDict, tensors: Tensors) -> TrainState:
    """The state at step 0 with the weights and memory of a detector, or with a backbone alone."""
    model, detector = build_model(config), is_detector(tensors)
    rows = config.loss.lut_size or len(tensors.get(LOOKUP_TABLE, ()))
    memory = init_memory(rows, config.loss.queue_size, config.model.channels)
    memories = {"memory": memory} | ({"roi_memory": memory} if config.model.roi else {})
    template = leaves_by_path(vars(weights_template(model)) | memories)
    del template["step"]
    template.pop("roi_memory/tail", None)  # released files do not hold it
    if not detector:
        template = {path: x for path, x in template.items() if "/backbone/" in path}
    arrays = by_our_names(tensors, template)
    if not detector:  # deformable convolutions start without offsets
        offsets = {path: np.zeros(x.shape) for path, x in template.items() if "/offset/" in path}
        arrays = offsets | arrays
    arrays = _checked(arrays, template)
    found = traverse_util.unflatten_dict(arrays, sep="/")
    memory = OIMMemory(**found["memory"]) if detector else init_memory(0, 0, 0)
    state = TrainState(jnp.zeros((), jnp.int32), found["params"], found["frozen"], (), memory)
    if not detector:
        return state
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    raw = state.params if config.train.ema_decay is not None else None
    roi = OIMMemory(**found["roi_memory"], tail=jnp.int32(0)) if config.model.roi else None
    opt_state = optimizer.init(state.params)
    return dataclasses.replace(state, opt_state=opt_state, raw=raw, roi_memory=roi)


def _checked(arrays: Tensors, template: Mapping[str, Any]) -> Tensors:
    """The arrays in the order and the types of the template; ValueError if they do not fit it."""
    found, expected = (
        {released_name(p): list(to_torch(np.empty(x.shape, bool), p).shape) for p, x in of}
        for of in (arrays.items(), template.items())
    )
    if wrong := mismatch(found, expected):
        raise ValueError(
            f"does not fit the config: {wrong} ({kind_of(found)}; "
            "each released detector has its own: cuhk or prw, :released, :released_plus or :roi)"
        )
    return {path: np.array(arrays[path], x.dtype, order="C") for path, x in template.items()}
