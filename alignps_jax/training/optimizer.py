"""SGD as the paper trains: warm-up, steps, clipping, decay, and rules for biases (optax)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from alignps_jax.registry import choose
from alignps_jax.types import UserError

_SMALL = 2**20  # elements
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def steps_of(field: str, duration: str, steps_per_epoch: int) -> int:
    """Turns a duration such as "24 epochs" or "300 steps" into steps.

    Raises:
      UserError: `duration`, the value of `field`, is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", duration)
    if not found:
        raise UserError(
            f'{field}: found {duration!r}, expected "<number> epochs" or "<number> steps"'
        )
    return round(float(found[1]) * (steps_per_epoch if found[2] == "epoch" else 1))


def batch_factor(config: ConfigDict) -> float:
    """What the learning rate is multiplied by: 1, or linear in the batch (Goyal et al., 2017)."""
    meant_for = config.optimizer.scale_with_batch
    return config.train.batch_size / meant_for if meant_for else 1.0


def learning_rate_schedule(
    optimizer: ConfigDict, steps_per_epoch: int, factor: float = 1.0
) -> Schedule:
    """The rate at a step: linear warm-up, times `drop_factor` after each of `drops`.

    All of it times `factor`.
    """
    drops = [steps_of("config.optimizer.drops", d, steps_per_epoch) for d in optimizer.drops]
    rate = optax.piecewise_constant_schedule(
        factor * optimizer.learning_rate, dict.fromkeys(drops, optimizer.drop_factor)
    )
    warmup_steps = steps_of("config.optimizer.warmup", optimizer.warmup, steps_per_epoch)
    warmup = optax.linear_schedule(optimizer.warmup_start, 1.0, warmup_steps)
    return (lambda step: rate(step) * warmup(step)) if warmup_steps else rate


def parameter_labels(params: Any, is_frozen: Callable[[tuple[str, ...]], bool]) -> Any:
    """`frozen`, `bias` or `weight` for every parameter.

    `bias` are those of plain and DCNv2 main convolutions, not of offset convolutions and of
    normalization (Released code).
    """
    flat = traverse_util.flatten_dict(params)

    def label(path: tuple[str, ...]) -> str:
        if is_frozen(path):
            return "frozen"
        of_conv = path[-1] == "bias" and (*path[:-1], "kernel") in flat
        return "bias" if of_conv and path[-2] != "offset" else "weight"

    return traverse_util.unflatten_dict({path: label(path) for path in flat})


def _sgd(momentum: float, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """PyTorch's SGD: weight decay enters the momentum."""
    return optax.chain(decay, optax.trace(momentum))


def _adamw(momentum: float, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter)."""
    return optax.chain(optax.scale_by_adam(b1=momentum), decay)


RULES = {"sgd": _sgd, "adamw": _adamw}


def global_norm(tree: Any) -> Float[Array, ""]:
    """Over all arrays; small ones end to end on NVIDIA's GPUs, where each is two launches."""

    def end_to_end(tree: Any) -> Float[Array, ""]:
        leaves = jax.tree.leaves(tree)
        small = [x.ravel() for x in leaves if x.size <= _SMALL]
        large = [x for x in leaves if x.size > _SMALL]
        return optax.tree.norm([*large, jnp.concatenate([jnp.zeros(0), *small])])

    return lax.platform_dependent(tree, cuda=end_to_end, default=optax.tree.norm)


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with our norm, which the step wants to know as well."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = global_norm(gradient)
        return jax.tree.map(lambda g: jnp.where(norm < most, g, g / norm * most), gradient), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(
    optimizer: ConfigDict,
    schedule: Schedule,
    is_frozen: Callable[[tuple[str, ...]], bool],
) -> optax.GradientTransformation:
    """Clips the global norm of the gradient, then updates by `optimizer.name`'s rule.

    Frozen parameters get no update and, having no gradient, no share in the norm.

    Raises:
      UserError: there is no such rule.
    """
    rule = partial(choose("config.optimizer.name", optimizer.name, RULES), optimizer.momentum)

    def group(rate_factor: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            rule(optax.add_decayed_weights(weight_decay)),
            optax.scale_by_learning_rate(lambda step: rate_factor * schedule(step)),
        )

    weight_decay, bias_weight_decay = optimizer.weight_decay, optimizer.bias_weight_decay
    groups = {
        "weight": group(1.0, weight_decay),
        "bias": group(
            optimizer.bias_lr_factor,
            weight_decay if bias_weight_decay is None else bias_weight_decay,
        ),
        "frozen": optax.set_to_zero(),
    }
    return optax.chain(
        _clip_by_global_norm(optimizer.clip_norm),
        optax.partition(groups, lambda params: parameter_labels(params, is_frozen)),
    )
