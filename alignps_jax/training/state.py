"""The state before the first step: parameters, optimizer, and the memory's size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import AlignPS, init_variables
from alignps_jax.training.pretrained import Arrays
from alignps_jax.types import TrainState, UserError


def is_frozen(model: AlignPS, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is never updated."""
    return path[0] == "backbone" and model.backbone.is_frozen(path[1:])


def positives_per_image(config: ConfigDict, people: int) -> int:
    """Maximum number of positive locations of an image with this many people."""
    # Those inside a square of 2 `center_radius` strides on each level.
    per_level = math.ceil(2 * config.loss.center_radius) ** 2
    return config.train.max_positives or per_level * len(config.model.levels) * people


def lut_size(config: ConfigDict, found: int) -> int:
    """Rows of the lookup table: as configured, which must do, or one per `found` identity."""
    size = found if config.loss.lut_size is None else config.loss.lut_size
    if size < found:
        raise UserError(
            f"config.loss.lut_size: found {size}, expected at least the {found} identities of "
            f"the training set in {config.data.root}"
        )
    return size


def create_state(
    config: ConfigDict,
    model: AlignPS,
    optimizer: optax.GradientTransformation,
    num_identities: int,
    weights: Arrays | None = None,
) -> TrainState:
    """The state before the first step: of `config.seed`, with the `weights` to start from."""
    params, frozen = init_variables(model, jax.random.key(config.seed))
    if weights:
        tree = {"params": params, "frozen": frozen}
        flat = leaves_by_path(tree)
        flat |= {name: jnp.asarray(array, flat[name].dtype) for name, array in weights.items()}
        tree = jax.tree.unflatten(jax.tree.structure(tree), flat.values())
        params, frozen = tree["params"], tree["frozen"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(params),  # one program, not one for each shape
        memory=init_memory(num_identities, config.loss.queue_size, config.model.channels),
        raw=params if config.train.ema_decay is not None else None,
    )
