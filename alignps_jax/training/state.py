"""The state before the first step: parameters, optimizer, and the memory's size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import AlignPS, init_variables
from alignps_jax.training.pretrained import with_pretrained_backbone
from alignps_jax.types import TrainState, UserError
from data_pipeline.datasets import PreparedDataset
from data_pipeline.pipeline import TrainPipeline

# Locations of which centre sampling can make positives of one box on one level: 3 x 3, with 1.5
# strides. A person whose size is near a border can have them on several levels.
POSITIVES_PER_LEVEL = 9


def is_frozen(model: AlignPS, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is never updated."""
    return path[0] == "backbone" and model.backbone.is_frozen(path[1:])


def max_positives(config: ConfigDict, pipeline: TrainPipeline) -> int:
    """Static number of positive locations per device."""
    per_person = POSITIVES_PER_LEVEL * len(config.model.levels)
    per_image = config.train.max_positives or per_person * pipeline.people
    return per_image * config.train.batch_size // jax.device_count()


def lut_size(config: ConfigDict, data: PreparedDataset) -> int:
    """Rows of the lookup table: as configured, or one per identity of the training set."""
    found = data.train.annotations.num_identities
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
) -> TrainState:
    """The state before the first step, decided by `config.seed` and `config.model.pretrained`."""
    params, frozen = init_variables(model, jax.random.key(config.seed))
    if config.model.pretrained:
        params, frozen = with_pretrained_backbone(params, frozen, config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        memory=init_memory(num_identities, config.loss.queue_size, config.model.channels),
    )
