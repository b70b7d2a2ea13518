"""Published PyTorch weights to checkpoints of ours, and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
from alignps_jax.files import check_outputs
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.types import OIMMemory, TrainState, UserError, Weights
from alignps_jax.weights.conventions import CONVENTIONS, Convention, with_convention
from alignps_jax.weights.released_names import (
    LOOKUP_TABLE,
    QUEUE,
    backbone_origin,
    backbone_tensors,
    from_torch,
    is_detector,
    is_only_released,
    released_name,
    to_torch,
)
from alignps_jax.weights.sources import known_convention
from alignps_jax.weights.tensor_files import (
    Tensors,
    check_target,
    listed,
    read_tensors,
    write_tensors,
)

# Beside the checkpoints: the tensors of a converted file that the model has no place for.
EXTRAS = "released_only.safetensors"


def convert_released(
    config: ConfigDict,
    source: Path,
    workdir: Path,
    convention: str | None = None,
    typed: Collection[str] = (),
) -> None:
    """Writes a checkpoint (step 0) with the weights of a PyTorch file to `workdir`.

    A released detector becomes a complete checkpoint, memory included, as training writes them; an
    ImageNet ResNet-50 one of the backbone only, for `config.model.pretrained`. `convention`, a key
    of `CONVENTIONS`, says what pixels a ResNet-50 expects; None trusts what its tensors' names
    tell, and only that. The checkpoint's configuration gets these pixels; `typed` are the dotted
    names of the fields that the command line sets.

    Raises:
      UserError: the file cannot be read, is neither of the two, does not fit `config`, or does
        not tell its convention; or there are checkpoints in `workdir` already. Nothing is written
        then.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir: found checkpoints in {workdir}, expected none")
    if config.model.backbone != "resnet50":
        raise UserError(
            f"config.model.backbone: found {config.model.backbone!r}, expected 'resnet50' to "
            f"convert {source}"
        )
    if convention not in (None, *CONVENTIONS):
        raise UserError(
            f"--convention: found {convention!r}, expected one of {', '.join(CONVENTIONS)}"
        )
    check_outputs(*(workdir / name for name in ("checkpoints", *RUN_INFO, EXTRAS)))
    tensors = read_tensors(source)
    if is_detector(tensors):
        state, extras = _detector_state(config, tensors, source)
    else:
        state, extras = _backbone_state(config, tensors, source), {}
    expected = _convention(tensors, source, convention)
    config = with_convention(config, expected, typed, str(source))
    with (
        one_writer(workdir),
        Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints,
    ):
        checkpoints.save(state, None)
    write_run_info(workdir, config)
    if extras:
        write_tensors(workdir / EXTRAS, extras, {})
    print(f"{len(tensors)} tensors of {source} are now in {workdir}")
    levels = sorted(name for name in extras if not name.endswith("num_batches_tracked"))
    if levels:
        print(
            f"note: {len(levels)} tensors of the training-only levels P4-P7 ({levels[0]}, ...) "
            "have no place in this model (config.model.background_levels=False); "
            f"{workdir / EXTRAS} keeps them for --mode=export"
        )


def _convention(tensors: Tensors, source: Path, said: str | None) -> Convention:
    """The pixels that the tensors of a file expect, as `said`, or as their names tell."""
    if is_detector(tensors):
        if said not in (None, "caffe"):
            raise UserError(
                f"--convention: found {said!r}, expected 'caffe' or nothing: {source} is a "
                "released detector, whose convention is known"
            )
        return CONVENTIONS["caffe"]
    known = said or known_convention(str(source)) or backbone_origin(tensors)
    if known is None:
        raise UserError(
            f"{source}: its names do not tell what pixels this ResNet-50 was trained on, expected "
            "--convention=torchvision (RGB, divided by the standard deviation; also timm, DINO, "
            "MoCo, SwAV) or --convention=caffe (BGR, not divided; MSRA's, and most of detectron2's)"
        )
    return CONVENTIONS[known]


def export_released(checkpoint: Path, target: Path, config: ConfigDict | None = None) -> None:
    """Writes the chosen step of a workdir, or one step's folder, in the released naming.

    `config` goes into the file as its metadata (None: the checkpoint's own).

    Raises:
      UserError: it holds no AlignPS with a ResNet-50, or `target` cannot be written.
    """
    check_target(target)
    config = config or load_config(checkpoint)
    if config.model.backbone != "resnet50":
        raise UserError(
            f"{checkpoint}: found the backbone {config.model.backbone!r}, expected 'resnet50': the "
            "released code has no other"
        )
    folders = ("step", "params", "frozen", "memory")
    folder, by = chosen_step(checkpoint, config)
    arrays = load_arrays(folder, lambda name: name.split("/")[0] in folders)
    step = int(arrays.pop("step"))
    if "memory/lut" not in arrays:
        raise UserError(f"{checkpoint}: holds a backbone only, expected a whole AlignPS")
    tensors = {released_name(name): to_torch(array) for name, array in arrays.items()}
    tensors = {
        name: value.astype(np.int64) if name.endswith(".tail") else value
        for name, value in tensors.items()
    }
    for name in [name for name in tensors if name.endswith(".running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        tensors[counter] = np.zeros((), np.int64)
    tensors |= _extras(checkpoint, tensors)
    about = {"exported_by": "alignps_jax", "step": str(step), "chosen_by": by}
    about["config"] = config.to_json()
    write_tensors(target, tensors, about)
    print(
        f"{len(tensors)} tensors of step {step} of {checkpoint} (chosen by {by}) are now in "
        f"{target}"
    )
    if "bbox_head.scales.1.scale" not in tensors:
        print(
            "note: neck.fpn_convs.1-4 and bbox_head.scales.1-4 are missing, as the model was "
            "trained without background levels; the released code uses them in training only"
        )


def _extras(checkpoint: Path, tensors: Tensors) -> Tensors:
    """What a conversion into this workdir left over and the model still has no place for."""
    files = [folder / EXTRAS for folder in (checkpoint, *checkpoint.absolute().parents[:2])]
    for file in files:
        if file.is_file():
            return {
                name: value
                for name, value in read_tensors(file).items()
                if is_only_released(name)
                and (name not in tensors or name.endswith("num_batches_tracked"))
            }
    return {}


def _detector_state(
    config: ConfigDict, tensors: Tensors, source: Path
) -> tuple[TrainState, Tensors]:
    """The state before any training step, and the tensors that it has no place for."""
    _check_kind(config, tensors, source)
    model = build_model(config)
    memory = _memory_template(config, tensors)
    template = {**_template(weights_template(model)), **leaves_by_path({"memory": memory})}
    named = {released_name(path): path for path in template}
    extras = {
        name: value
        for name, value in tensors.items()
        if name not in named and is_only_released(name)
    }
    _check_extras(config, extras, source)
    used = {name: value for name, value in tensors.items() if name not in extras}
    arrays = _fill(named, template, used, source)
    tail, queue = int(arrays["memory/tail"]), memory.queue.shape[0]
    if not 0 <= tail < max(queue, 1):
        raise UserError(f"{source}: tail: found {tail}, expected a slot of the queue of {queue}")
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    optimizer = make_optimizer(
        config.optimizer,
        learning_rate_schedule(config.optimizer, steps_per_epoch=1),
        lambda path: is_frozen(model, path),
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=tree["params"],
        frozen=tree["frozen"],
        opt_state=optimizer.init(tree["params"]),
        memory=OIMMemory(**tree["memory"]),
        raw=tree["params"] if config.train.ema_decay is not None else None,
    )
    return state, extras


def _check_extras(config: ConfigDict, extras: Tensors, source: Path) -> None:
    """Raises UserError unless the tensors have the shapes and types that training gives them."""
    full = ConfigDict(config.to_dict())
    full.model.background_levels = True
    template = _template(weights_template(build_model(full)))
    template = {released_name(path): leaf for path, leaf in template.items()}
    for name in extras:
        if name.endswith(".num_batches_tracked"):
            template[name] = jax.ShapeDtypeStruct((), jnp.int32)  # 64 bits in the files
    named = {name: name for name in extras if name in template}
    _fill(named, template, extras, source)


def _backbone_state(config: ConfigDict, tensors: Tensors, source: Path) -> TrainState:
    """A state of which only the backbone exists."""
    template = {
        path: leaf
        for path, leaf in _template(weights_template(build_model(config))).items()
        if "/backbone/" in path
    }
    offsets = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in template.items()
        if "/offset/" in path
    }
    named = {released_name(path): path for path in template if path not in offsets}
    found = {
        name: value
        for name, value in backbone_tensors(tensors, str(source)).items()
        if not name.endswith("num_batches_tracked")
    }
    arrays = _fill(named, template, found, source)
    tree = traverse_util.unflatten_dict(offsets | arrays, sep="/")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=tree["params"],
        frozen=tree["frozen"],
        opt_state=(),
        memory=init_memory(0, 0, config.model.channels),
    )


def _check_kind(config: ConfigDict, tensors: Tensors, source: Path) -> None:
    """Raises UserError, naming the field, for the config of another released model."""
    offsets = (re.match(r"backbone\.layer(\d)\..*conv_offset", name) for name in tensors)
    stages = tuple(sorted({int(found[1]) + 1 for found in offsets if found}))
    if stages != tuple(config.model.deform_stages):
        kind = "AlignPS+, :plus" if stages else "AlignPS, not :plus"
        raise UserError(
            f"config.model.deform_stages: found {tuple(config.model.deform_stages)}, expected "
            f"{stages} as in {source} ({kind})"
        )
    for name, field in ((LOOKUP_TABLE, "lut_size"), (QUEUE, "queue_size")):
        configured = config.loss[field]
        if name in tensors and configured is not None and tensors[name].ndim == 2:
            rows = tensors[name].shape[0]
            if rows != configured:
                raise UserError(
                    f"config.loss.{field}: found {configured}, expected {rows} as in {source} "
                    "(CUHK-SYSU has 5532 identities and a queue of 5000, PRW 483 and 500)"
                )


def _memory_template(config: ConfigDict, tensors: Tensors) -> OIMMemory:
    """A memory with as many identities as the file has, or the configuration asks for."""
    lut = tensors.get(LOOKUP_TABLE, np.zeros((config.loss.lut_size or 0, 0)))
    rows = lut.shape[0] if lut.ndim else 0
    return jax.eval_shape(lambda: init_memory(rows, config.loss.queue_size, config.model.channels))


def _template(weights: Weights) -> dict[str, jax.ShapeDtypeStruct]:
    return leaves_by_path({"params": weights.params, "frozen": weights.frozen})


def _fill(
    named: Mapping[str, str],
    template: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, np.ndarray],
    source: Path,
) -> dict[str, np.ndarray]:
    """The tensors under our paths, in our layout; `named` gives the path of each.

    Raises:
      UserError: some are missing, unexpected, of the wrong shape or type, not finite, or
        variances below zero.
    """
    common = [name for name in named if name in tensors]
    arrays = {named[name]: from_torch(tensors[name]) for name in common}
    wanted = {name: template[named[name]] for name in common}
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(_torch_shape(leaf.shape))}"
        for name, leaf in wanted.items()
        if arrays[named[name]].shape != leaf.shape
    ]
    types = [
        f"{name} {tensors[name].dtype}"
        for name, leaf in wanted.items()
        if tensors[name].dtype != (np.int64 if leaf.dtype == np.int32 else leaf.dtype)
    ]
    problems = {
        "missing": [name for name in named if name not in tensors],
        "unexpected": [name for name in tensors if name not in named],
        "wrong shape": shapes,
        "wrong type": types,
        "not finite": [name for name in common if not np.isfinite(tensors[name]).all()],
        "a negative variance": [
            name for name in common if name.endswith("running_var") and (tensors[name] < 0).any()
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise UserError(f"{source}: does not fit the configured model: {found}")
    return {
        path: np.ascontiguousarray(array.astype(template[path].dtype)).reshape(array.shape)
        for path, array in arrays.items()
    }


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else shape
