"""Random batches and states for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from alignps_jax.nn.model import AlignPS, build_model
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.setup import create_state
from alignps_jax.training.step import TrainStep
from alignps_jax.types import Batch, OIMMemory, Positives, TrainState

NUM_IDENTITIES = 7
MAX_POSITIVES = 40


def random_batch(
    rng: np.random.Generator, images: int = 4, people: int = 4, bucket: tuple[int, int] = (96, 128)
) -> Batch:
    """Noise images of different sizes in one bucket, with labeled and unlabeled people."""
    height, width = bucket
    heights = rng.integers(height - 31, height + 1, images)
    widths = rng.integers(width // 2, width + 1, images)
    size = np.stack([heights, widths], axis=1).astype(np.int32)
    image = rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8)
    corner = rng.uniform(0, 0.6, (images, people, 2)) * size[:, None, ::-1]
    extent = rng.uniform(0.15, 0.39, (images, people, 2)) * size[:, None, ::-1]
    return Batch(
        image=image,
        size=size,
        scale=np.ones((images, 2), np.float32),
        index=np.arange(images, dtype=np.int32),
        valid_image=np.ones(images, bool),
        boxes=np.concatenate([corner, corner + extent], -1).astype(np.float32),
        identity=rng.integers(0, NUM_IDENTITIES, (images, people)).astype(np.int32),
        labeled=rng.random((images, people)) < 0.7,
        valid=rng.random((images, people)) < 0.9,
    )


def positives_of(
    embeddings: Array, identity: Array, labeled: Array | bool = True, valid: Array | bool = True
) -> Positives:
    """Positive locations as the re-id losses see them, without boxes."""
    count = len(identity)
    return Positives(
        valid=jnp.broadcast_to(jnp.asarray(valid), count),
        distances=jnp.zeros((count, 4)),
        centerness_logits=jnp.zeros(count),
        embeddings=jnp.asarray(embeddings),
        target_distances=jnp.zeros((count, 4)),
        target_centerness=jnp.zeros(count),
        identity=jnp.asarray(identity),
        labeled=jnp.broadcast_to(jnp.asarray(labeled), count),
    )


def random_memory(rng: np.random.Generator, config: ConfigDict) -> OIMMemory:
    """A memory in the middle of training."""

    def rows(count: int) -> np.ndarray:
        vectors = rng.normal(size=(count, config.model.channels)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return OIMMemory(
        lut=jnp.asarray(rows(NUM_IDENTITIES)),
        queue=jnp.asarray(rows(config.loss.queue_size)),
        tail=jnp.asarray(config.loss.queue_size - 2, jnp.int32),
    )


def randomize(params: dict, seed: int = 5, scale: float = 0.05) -> dict:
    """Parameters off their initial values, so that no offset and no bias is zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, noisy)


def train_setup(config: ConfigDict, devices: int) -> tuple[AlignPS, TrainStep, TrainState]:
    """Model, step (for that many devices) and a state in the middle of training."""
    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=10)
    optimizer = make_optimizer(config.optimizer, schedule, lambda path: is_frozen(model, path))
    state = create_state(config, model, optimizer, NUM_IDENTITIES)
    state = state.replace(
        params=randomize(state.params),
        memory=random_memory(np.random.default_rng(3), config),
    )
    return model, TrainStep(model, optimizer, config.loss, MAX_POSITIVES * 4 // devices), state
