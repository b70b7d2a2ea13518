"""SGD as the paper trains: warm-up, steps, clipping, decay, and rules for biases (optax)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from alignps_jax.config import steps_of
from alignps_jax.nn.model import AlignPS

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def learning_rate_schedule(
    optimizer: ConfigDict, steps_per_epoch: int, batch_size: int = 1
) -> Schedule:
    """The rate at a step: linear warm-up, `drop_factor` after each of `drops`.

    With `scale_with_batch`, linear in the batch (Goyal et al., 2017).
    """
    drops = [steps_of(drop, steps_per_epoch) for drop in optimizer.drops]
    factor = batch_size / optimizer.scale_with_batch if optimizer.scale_with_batch else 1.0
    rate = optax.piecewise_constant_schedule(
        factor * optimizer.learning_rate, dict.fromkeys(drops, optimizer.drop_factor)
    )
    warmup_steps = steps_of(optimizer.warmup, steps_per_epoch)
    warmup = optax.linear_schedule(optimizer.warmup_start, 1.0, warmup_steps)
    return (lambda step: rate(step) * warmup(step)) if warmup_steps else rate


def is_frozen(model: AlignPS, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is never updated."""
    return path[0] == "backbone" and model.backbone.is_frozen(path[1:])


def parameter_labels(params: Any, frozen: Callable[[tuple[str, ...]], bool]) -> Any:
    """`frozen`, `bias` (of a convolution that predicts no offsets) or `weight` (Released code)."""
    flat = traverse_util.flatten_dict(params)

    def label(path: tuple[str, ...]) -> str:
        if frozen(path):
            return "frozen"
        of_conv = path[-1] == "bias" and (*path[:-1], "kernel") in flat
        return "bias" if of_conv and path[-2] != "offset" else "weight"

    return traverse_util.unflatten_dict({path: label(path) for path in flat})


# Of momentum and decay of the weights.
RULES = {
    # PyTorch's SGD: weight decay enters the momentum.
    "sgd": lambda momentum, decay: optax.chain(decay, optax.trace(momentum)),
    # Adam with decoupled weight decay (Loshchilov and Hutter).
    "adamw": lambda momentum, decay: optax.chain(optax.scale_by_adam(b1=momentum), decay),
}


def make_optimizer(
    optimizer: ConfigDict, schedule: Schedule, frozen: Callable[[tuple[str, ...]], bool]
) -> optax.GradientTransformation:
    """Clips the global norm of the gradient, then updates by `optimizer.name`'s rule.

    Frozen parameters get no update and no share in the norm.
    """

    def group(rate_factor: float, weight_decay: float) -> optax.GradientTransformation:
        rule = RULES[optimizer.name](optimizer.momentum, optax.add_decayed_weights(weight_decay))
        rate = optax.scale_by_learning_rate(lambda step: rate_factor * schedule(step))
        return optax.chain(rule, rate)

    decay, bias_decay = optimizer.weight_decay, optimizer.bias_weight_decay
    groups = {
        "weight": group(1.0, decay),
        "bias": group(optimizer.bias_lr_factor, decay if bias_decay is None else bias_decay),
        "frozen": optax.set_to_zero(),
    }
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.partition(groups, lambda params: parameter_labels(params, frozen)),
    )
