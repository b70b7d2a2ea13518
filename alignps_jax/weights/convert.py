"""Published PyTorch weights to checkpoints of ours, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.choice import chosen_step
from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.checkpoint.store import (
    RUN_INFO,
    Checkpoints,
    load_arrays,
    load_config,
    write_run_info,
)
from alignps_jax.errors import blame
from alignps_jax.files import check_outputs
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.state import is_frozen
from alignps_jax.types import OIMMemory, TrainState, UserError
from alignps_jax.weights.conventions import convention_of, with_convention
from alignps_jax.weights.released_names import (
    LOOKUP_TABLE,
    QUEUE,
    backbone_tensors,
    from_torch,
    is_detector,
    is_only_released,
    kind_of,
    released_name,
    to_torch,
)
from alignps_jax.weights.tensor_files import Tensors, listed, read_tensors, write_tensors

Template = Mapping[str, jax.ShapeDtypeStruct]


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

    Raises:
      UserError: the file cannot be read, is neither of the two, does not fit `config`, or does
        not tell its pixels; or there are checkpoints in `workdir` already. Nothing is written then.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir: found checkpoints in {workdir}, expected none")
    _check_backbone(config, source)
    check_outputs(*(workdir / name for name in ("checkpoints", *RUN_INFO)))
    tensors = read_tensors(source, averaged)
    with blame(source):
        state = (_detector_state if is_detector(tensors) else _backbone_state)(config, tensors)
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

    Raises:
      UserError: it holds no AlignPS with a ResNet-50, or `target` cannot be written.
    """
    check_outputs(target)
    config = config or load_config(checkpoint)
    _check_backbone(config, checkpoint)
    folder, by = chosen_step(checkpoint, config)
    kept = ("step", "params", "frozen", "memory")
    arrays = load_arrays(folder, lambda name: name.split("/")[0] in kept)
    step = int(arrays.pop("step"))
    if "memory/lut" not in arrays:
        raise UserError(f"{checkpoint}: holds a backbone only, expected a whole AlignPS")
    tensors = {released_name(name): to_torch(array) for name, array in arrays.items()}
    tail = QUEUE.replace("queue", "tail")
    tensors[tail] = tensors[tail].astype(np.int64)
    for name in [name for name in tensors if name.endswith(".running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        tensors[counter] = np.zeros((), np.int64)
    about = {"exported_by": "alignps_jax", "step": str(step), "chosen_by": by}
    write_tensors(target, tensors, {**about, "config": config.to_json()})
    print(f"{len(tensors)} tensors of step {step} of {checkpoint} (chosen by {by}): {target}")
    if "bbox_head.scales.1.scale" not in tensors:
        print(
            "note: neck.fpn_convs.1-4 and bbox_head.scales.1-4 are missing, as this model has no "
            "background levels; the released code uses them in training only"
        )


def _check_backbone(config: ConfigDict, path: Path) -> None:
    if config.model.backbone != "resnet50":
        raise UserError(
            f"config.model.backbone: found {config.model.backbone!r}, expected 'resnet50' as in "
            f"the released code, for {path}"
        )


def _detector_state(config: ConfigDict, tensors: Tensors) -> TrainState:
    """The state before the first step of training that goes on from a detector."""
    model = build_model(config)
    rows = config.loss.lut_size or len(tensors.get(LOOKUP_TABLE, ()))
    sizes = rows, config.loss.queue_size, config.model.channels
    memory = leaves_by_path({"memory": jax.eval_shape(lambda: init_memory(*sizes))})
    template = {**_template(config), **memory}
    named = {released_name(path): path for path in template}
    used = {n: x for n, x in tensors.items() if n in named or not is_only_released(n)}
    tree = _fill(named, template, used)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=tree["params"],
        frozen=tree["frozen"],
        opt_state=optimizer.init(tree["params"]),
        memory=OIMMemory(**tree["memory"]),
        raw=tree["params"] if config.train.ema_decay is not None else None,
    )


def _backbone_state(config: ConfigDict, tensors: Tensors) -> TrainState:
    """A state of which only the backbone exists; offsets of deformable convolutions are zero."""
    template = {path: x for path, x in _template(config).items() if "/backbone/" in path}
    named = {released_name(path): path for path in template if "/offset/" not in path}
    found = backbone_tensors(tensors)
    used = {name: x for name, x in found.items() if not is_only_released(name)}
    tree = _fill(named, template, used)
    memory = init_memory(0, 0, config.model.channels)
    return TrainState(jnp.zeros((), jnp.int32), tree["params"], tree["frozen"], (), memory)


def _template(config: ConfigDict) -> Template:
    weights = weights_template(build_model(config))
    return leaves_by_path({"params": weights.params, "frozen": weights.frozen})


def _fill(named: Mapping[str, str], template: Template, tensors: Tensors) -> dict:
    """The template's tree with the tensors in our layout, zeros where no tensor belongs.

    `named` gives our path of a tensor. Raises ValueError if tensors are missing, unexpected or of
    the wrong shape.
    """
    arrays = {named[name]: from_torch(x) for name, x in tensors.items() if name in named}
    problems = {
        "missing": [name for name in named if name not in tensors],
        "unexpected": [name for name in tensors if name not in named],
        "wrong shape": [
            f"{released_name(path)} {list(to_torch(x).shape)} instead of "
            f"{list(to_torch(np.empty(template[path].shape)).shape)}"
            for path, x in arrays.items()
            if x.shape != template[path].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"does not fit the config: {found} ({kind_of(tensors)}; of the released detectors, "
            "cuhk and prw have one each for :released and :released_plus)"
        )
    filled = {
        path: np.array(arrays[path] if path in arrays else np.zeros(x.shape), x.dtype, order="C")
        for path, x in template.items()
    }
    return traverse_util.unflatten_dict(filled, sep="/")
