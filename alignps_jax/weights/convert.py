"""Published PyTorch weights to checkpoints of ours, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import Checkpoints, load_arrays, load_config, write_run_info
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.pretrained import check_convention
from alignps_jax.training.state import is_frozen
from alignps_jax.types import OIMMemory, TrainState, UserError, Weights
from alignps_jax.weights.released_names import (
    LOOKUP_TABLE,
    QUEUE,
    backbone_tensors,
    from_torch,
    is_only_released,
    released_name,
    to_torch,
)
from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors

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
# Beside the checkpoints: the tensors of a converted file that the model has no place for.
EXTRAS = "released_only.npz"


def convert_released(config: ConfigDict, source: Path, workdir: Path) -> None:
    """Writes a checkpoint (step 0) with the weights of a PyTorch file to `workdir`.

    A released detector becomes a whole checkpoint, memory included, as training writes them; an
    ImageNet ResNet-50 one of the backbone only, for `config.model.pretrained`.

    Raises:
      UserError: the file cannot be read, is neither of the two, or does not fit `config`; or
        there are checkpoints in `workdir` already. Nothing is written then.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir: found checkpoints in {workdir}, expected none")
    if config.model.backbone != "resnet50":
        raise UserError(
            f"config.model.backbone: found {config.model.backbone!r}, expected 'resnet50' to "
            f"convert {source}"
        )
    tensors = read_tensors(source)
    if any(name.startswith(("bbox_head.", "neck.")) for name in tensors):
        state, extras = _detector_state(config, tensors, source)
    else:
        state, extras = _backbone_state(config, tensors, source), {}
    with Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints:
        checkpoints.save(state, None)
    write_run_info(workdir, config)
    if extras:
        np.savez(workdir / EXTRAS, **extras)
    print(f"{len(tensors)} tensors of {source} are now in {workdir}")
    levels = sorted(name for name in extras if not name.endswith("num_batches_tracked"))
    if levels:
        print(
            f"note: {len(levels)} tensors of the training-only levels P4-P7 ({levels[0]}, ...) "
            "have no place in this model (config.model.background_levels=False); "
            f"{workdir / EXTRAS} keeps them for --mode=export"
        )


def export_released(checkpoint: Path, target: Path) -> None:
    """Writes the best checkpoint of a workdir, or one step's folder, in the released naming.

    Raises:
      UserError: it holds no AlignPS with a ResNet-50, or `target` cannot be written.
    """
    config = load_config(checkpoint)
    if config.model.backbone != "resnet50":
        raise UserError(
            f"{checkpoint}: found the backbone {config.model.backbone!r}, expected 'resnet50': the "
            "released code has no other"
        )
    folders = ("params", "frozen", "memory")
    arrays = load_arrays(checkpoint, lambda name: name.split("/")[0] in folders)
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
    write_tensors(target, tensors, {"exported_by": "alignps_jax", "config": config.to_json()})
    print(f"{len(tensors)} tensors of {checkpoint} are now in {target}")
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
            with np.load(file, allow_pickle=False) as extras:
                return {
                    name: extras[name]
                    for name in extras.files
                    if name not in tensors or name.endswith("num_batches_tracked")
                }
    return {}


def _detector_state(
    config: ConfigDict, tensors: Tensors, source: Path
) -> tuple[TrainState, Tensors]:
    """The state before any training step, and the tensors that it has no place for."""
    _check_kind(config, tensors, source)
    check_convention(config, CAFFE, str(source))
    model = build_model(config)
    memory = _memory_template(config, tensors)
    template = {**_template(weights_template(model)), **_paths({"memory": memory})}
    named = {released_name(path): path for path in template}
    extras = {
        name: value
        for name, value in tensors.items()
        if name not in named and is_only_released(name)
    }
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
        rng=jax.random.key(config.seed),
    )
    return state, extras


def _backbone_state(config: ConfigDict, tensors: Tensors, source: Path) -> TrainState:
    """A state of which only the backbone exists.

    torchvision and timm deliver their classifier with the backbone; in the Caffe-style .pth file
    there is none, and detectron2 and Caffe2 have names of their own.
    """
    is_torchvision = "fc.weight" in tensors and "conv1.weight" in tensors
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
        for name, value in backbone_tensors(tensors).items()
        if not name.endswith("num_batches_tracked")
    }
    arrays = _fill(named, template, found, source)
    kind = "torchvision and timm" if is_torchvision else "Caffe-style"
    expected = TORCHVISION if is_torchvision else CAFFE
    check_convention(config, expected, f"{source} ({kind} weights)")
    tree = traverse_util.unflatten_dict(offsets | arrays, sep="/")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=tree["params"],
        frozen=tree["frozen"],
        opt_state=(),
        memory=init_memory(0, 0, config.model.channels),
        rng=jax.random.key(config.seed),
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
    return _paths({"params": weights.params, "frozen": weights.frozen})


def _paths(tree: dict) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fill(
    named: Mapping[str, str],
    template: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, np.ndarray],
    source: Path,
) -> dict[str, np.ndarray]:
    """The tensors under our paths, in our layout; `named` gives the path of each.

    Raises:
      UserError: some are missing, unexpected, of the wrong shape or type, or not finite.
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
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_first(names)}" for what, names in problems.items() if names)
        raise UserError(f"{source}: does not fit the configured model: {listed}")
    return {
        path: np.ascontiguousarray(array.astype(template[path].dtype)).reshape(array.shape)
        for path, array in arrays.items()
    }


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else shape


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
