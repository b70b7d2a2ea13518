"""Our half of the comparisons with the oracle; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.devices import AXIS, replicate
from alignps_jax.inference.postprocess import detect
from alignps_jax.nn.model import AlignPS
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.step import TrainStep
from alignps_jax.types import Batch, Detections, OIMMemory, TrainState, Weights
from alignps_jax.weights.released_names import released_name, to_torch
from configs import cuhk, prw

# Our modules by the names of the stages that they output.
STAGES = {"layer1_2": "C2", "lateral3": "lateral3", "lateral4": "lateral4", "lateral5": "lateral5"}


def relative_error(found, expected) -> float:
    """L2 norm of the difference over that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def by_released_name(tree: Any) -> dict[str, np.ndarray]:
    """The leaves in PyTorch's layout, by released name; `tree` begins with the collections."""
    return {
        released_name(path): to_torch(np.asarray(x), path)
        for path, x in leaves_by_path(tree).items()
    }


def released_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes in PyTorch's layout, by released name; leaves may be mere descriptions."""
    leaves = leaves_by_path(tree).items()
    return {
        released_name(path): to_torch(np.empty(x.shape, np.bool_), path).shape for path, x in leaves
    }


def released_config(name: str, *, width: int, channels: int, groups: int) -> ConfigDict:
    """The config of a released model ("cuhk", "prw_plus", "prw_roi", ...) of these widths."""
    dataset, _, variant = name.partition("_")
    variant = {"": "released", "plus": "released_plus"}.get(variant, variant)
    config = {"cuhk": cuhk, "prw": prw}[dataset].get_config(variant)
    config.model.backbone_width = width
    config.model.channels = channels
    config.model.norm_groups = groups
    return config


def run_stages(
    model: AlignPS, weights: Weights, rules: ConfigDict, batch: Batch
) -> tuple[dict[str, np.ndarray], Detections]:
    """The outputs of every stage, [B, h, w, C], and the detections; `rules` is `config.eval`."""
    modules = (*STAGES, "backbone")

    @jax.jit
    def run(weights: Weights, batch: Batch):
        outputs, state = model.apply(
            {"params": weights.params, "frozen": weights.frozen},
            batch.image,
            batch.size,
            capture_intermediates=lambda module, _: module.name in modules,
            mutable=["intermediates"],
        )
        detections = detect(
            outputs,
            batch.size,
            batch.scale,
            strides=model.strides(train=False),
            pre_nms=rules.pre_nms,
            min_cls_score=rules.min_cls_score,
            nms_iou=rules.nms_iou,
            max_detections=rules.max_detections,
        )
        return outputs[0], state["intermediates"], detections

    output, captured, detections = jax.device_get(run(weights, batch))
    maps = captured["backbone"].pop("__call__")[0]
    stages = dict(zip(("C3", "C4", "C5"), maps, strict=True))
    for module in captured.values():
        for name, value in module.items():
            stages[STAGES[name]] = value["__call__"][0]
    stages |= {
        "P3": output.embeddings,
        "cls": output.cls_logits[..., None],
        "box": output.box_distances,
        "centerness": output.centerness_logits[..., None],
    }
    return stages, detections


def apply_rules(optimizer: ConfigDict, rules: Mapping[str, Any]) -> None:
    """Gives `config.optimizer` what the oracle's `Trainer` takes; times are in steps."""
    optimizer.weight_decay, optimizer.clip_norm = rules["weight_decay"], rules["clip_norm"]
    optimizer.warmup = f"{rules['warmup']} steps"
    optimizer.drops = tuple(f"{step} steps" for step in rules["drops"])


def start_training(
    config: ConfigDict,
    model: AlignPS,
    weights: Weights,
    memory: OIMMemory,
    roi_memory: OIMMemory | None = None,
) -> tuple[Callable, TrainState]:
    """The step on one device, and the state before the first one.

    The optimizer's state has the last gradient beside its own.
    """
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    # Of whole numbers, optax makes float32 rates, in float64 too.
    inner = make_optimizer(
        config.optimizer,
        lambda step: schedule(jnp.asarray(step, float)),
        partial(is_frozen, model),
    )

    def update(gradient, state, params):
        updates, state = inner.update(gradient, state[1], params)
        return updates, (gradient, state)

    optimizer = optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), inner.init(params)), update
    )
    step, state = jnp.zeros((), jnp.int32), optimizer.init(weights.params)
    state = TrainState(step, weights.params, weights.frozen, state, memory, None, roi_memory)
    # Placed as the step returns it, else it compiles twice.
    state = replicate(state, jax.local_devices()[:1])
    return one_device(TrainStep(model, optimizer, config.loss, max_positives=100)), state


def one_device(step: TrainStep) -> Callable:
    """The step on the first device; batch and draws have a leading axis of length one."""
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, 0), out_axes=None, devices=jax.local_devices()[:1]
    )
    return lambda state, batch, draws=None: mapped(state, batch, draws)
