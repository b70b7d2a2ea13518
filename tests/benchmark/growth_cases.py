"""The pieces of work whose growth is measured, each as a function of (context, size)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignps_jax.boxes import locations
from alignps_jax.devices import parallel_train_step, replicate, split_over_devices
from alignps_jax.evaluation.metrics import search_metrics
from alignps_jax.experiments.benchmark.measure import peak_memory
from alignps_jax.gallery.nearest import top_k
from alignps_jax.inference.postprocess import detect
from alignps_jax.inference.predict import PredictStep
from alignps_jax.losses.oim import oim_loss, update_memory
from alignps_jax.losses.targets import assign_targets
from alignps_jax.losses.terms import triplet_loss
from alignps_jax.nn.model import build_model, init_variables
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.state import create_state, is_frozen
from alignps_jax.training.step import TrainStep
from alignps_jax.types import Batch, OIMMemory, Outputs
from configs import synthetic
from data_pipeline.transforms import Size
from tests.benchmark.evaluate import (
    THRESHOLD,
    Simulation,
    in_all_images,
    peak_of,
    simulate_detections,
    simulate_people,
)
from tests.benchmark.measure import Context
from tests.benchmark.search import QUERIES, K, unit_rows
from tests.fakes import positives_of

# The map of a 1500x900 image at stride 8, and the width of the embeddings.
MAP: Size = (116, 188)
STRIDE = 8
DIM = 256
POSITIVES_PER_LEVEL = 9  # with the radius of the paper
IDENTITIES = 1000
IMAGES = 2  # per step


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to be timed, and the bytes that it needs at most."""

    run: Callable[[], Any]
    memory: float


def inference(context: Context, pixels: int) -> Work:
    """The configured network on one image, from pixels to detections."""
    config = context.config
    model = build_model(config)
    params, frozen = init_variables(model, jax.random.key(0))
    batch = made_up_batch(bucket_of(pixels), people=8, images=1)
    return _compiled(PredictStep(model, config.eval), params, frozen, batch)


def training_step(context: Context, people: int) -> Work:
    """A step of the demo's network on its small images, on all devices."""
    config = synthetic.get_config()
    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=100)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    positives = POSITIVES_PER_LEVEL * people * IMAGES
    step = TrainStep(model, optimizer, config.loss, positives)
    images = IMAGES * jax.local_device_count()
    batch = split_over_devices(made_up_batch((192, 256), people=people, images=images))
    state = replicate(create_state(config, model, optimizer, IDENTITIES))
    compiled = parallel_train_step(step).lower(state, batch).compile()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return Work(run, peak_memory(compiled))


def targets(context: Context, people: int) -> Work:
    """Center sampling on the map of a large image."""
    height, width = MAP
    batch = made_up_batch((height * STRIDE, width * STRIDE), people=people, images=1)
    count = height * width
    assign = partial(assign_targets, center_radius=1.5)
    return _compiled(
        assign,
        locations(height, width, STRIDE),
        jnp.full(count, STRIDE, jnp.float32),
        jnp.tile(jnp.array([0.0, jnp.inf]), (count, 1)),
        jnp.ones(count, bool),
        *(jnp.asarray(x[0]) for x in (batch.boxes, batch.identity, batch.labeled, batch.valid)),
    )


def triplet(context: Context, people: int) -> Work:
    """The triplet loss over all positive locations of a batch, and its gradient."""
    embeddings, identity = _positives(people)

    def loss(embeddings: jax.Array, lut: jax.Array) -> jax.Array:
        people = positives_of(embeddings, identity)
        return triplet_loss(people, people, lut, offset=0, margin=0.3, first_lut_identity=0).sum

    lut = unit_rows(jax.random.key(1), IDENTITIES)
    return _compiled(jax.value_and_grad(loss), embeddings, lut)


def detections(context: Context, people: int) -> Work:
    """Decoding and suppression of a large image's map that shows so many people."""
    height, width = MAP
    batch = made_up_batch((height * STRIDE, width * STRIDE), people=people, images=1)
    points = np.asarray(locations(height, width, STRIDE))
    corners = batch.boxes[0]
    inside = (points[:, None] > corners[:, :2]) & (points[:, None] < corners[:, 2:])
    person = inside.all(axis=2).argmax(axis=1)
    shown = inside.all(axis=2).any(axis=1).reshape(1, height, width)
    sides = np.abs(np.tile(points, 2) - corners[person]).reshape(1, height, width, 4)
    noise = np.random.default_rng(0).normal(size=(1, height, width)).astype(np.float32)
    outputs = Outputs(
        cls_logits=np.where(shown, noise, noise - 10),
        box_distances=(sides / STRIDE).astype(np.float32),
        centerness_logits=noise[:, ::-1],
        embeddings=np.zeros((1, height, width, DIM), np.float32),
        valid=np.ones((1, height, width), bool),
    )
    found = partial(
        detect,
        strides=(STRIDE,),
        pre_nms=1000,
        min_cls_score=0.05,
        nms_iou=0.5,
        max_detections=100,
    )
    return _compiled(found, (outputs,), batch.size, batch.scale)


def oim(context: Context, identities: int) -> Work:
    """The OIM loss of a batch's positives, its gradient, and the update of the memory."""
    embeddings, identity = _positives(people=8)
    labeled = jnp.arange(len(identity)) % 2 == 0
    memory = OIMMemory(
        lut=unit_rows(jax.random.key(1), identities),
        queue=unit_rows(jax.random.key(2), 5000),
        tail=jnp.zeros((), jnp.int32),
    )

    def loss(embeddings: jax.Array, memory: OIMMemory) -> jax.Array:
        return oim_loss(
            positives_of(embeddings, identity, labeled),
            memory,
            inverse_lut_temperature=10.0,
            inverse_queue_temperature=10.0,
            focal_gamma=2.0,
        ).sum

    def step(embeddings: jax.Array, memory: OIMMemory) -> tuple[Any, OIMMemory]:
        found = jax.value_and_grad(loss)(embeddings, memory)
        return found, update_memory(
            memory,
            positives_of(embeddings, identity, labeled),
            momentum=0.5,
            normalize=True,
            queue_channels=None,
        )

    return _compiled(step, embeddings, memory)


def search(context: Context, embeddings: int) -> Work:
    """The nearest embeddings of some queries."""
    keys = jax.random.split(jax.random.key(0))
    gallery = unit_rows(keys[1], embeddings)
    return _compiled(partial(top_k, k=K), unit_rows(keys[0], QUERIES), gallery)


def figures(context: Context, images: int) -> Work:
    """The search figures of a fixed number of queries, each in all images."""
    size = Simulation(images=images, people=4 * images, queries=200, identities=100, appearances=8)
    people = simulate_people(size)
    protocol, found = in_all_images(people, size), simulate_detections(people)
    run = partial(search_metrics, protocol, found, score_threshold=THRESHOLD)
    return Work(run, found.embeddings.nbytes + peak_of(run))


def bucket_of(pixels: int) -> Size:
    """Sides in multiples of 32, about 3 : 4 to 3 : 5, of that area."""
    heights = range(32, int(np.sqrt(pixels)) + 1, 32)
    fitting = [(height, pixels // height) for height in heights if pixels % (32 * height) == 0]
    return min(fitting, key=lambda size: abs(size[1] / size[0] - 1.5))


def made_up_batch(bucket: Size, *, people: int, images: int) -> Batch:
    """Noise that fills the bucket, with people of a few strides somewhere."""
    rng = np.random.default_rng(0)
    height, width = bucket
    corner = rng.uniform(0, 0.8, (images, people, 2)) * (width, height)
    extent = rng.uniform(0.1, 0.2, (images, people, 2)) * height
    return Batch(
        image=rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8),
        size=np.full((images, 2), bucket, np.int32),
        scale=np.ones((images, 2), np.float32),
        index=np.arange(images, dtype=np.int32),
        valid_image=np.ones(images, bool),
        boxes=np.concatenate([corner, corner + extent], axis=2).astype(np.float32),
        identity=rng.integers(0, IDENTITIES, (images, people)).astype(np.int32),
        labeled=rng.random((images, people)) < 0.5,
        valid=np.ones((images, people), bool),
    )


def _positives(people: int) -> tuple[jax.Array, jax.Array]:
    """Embeddings and identities of a batch's positive locations: nine of each person."""
    embeddings = unit_rows(jax.random.key(0), POSITIVES_PER_LEVEL * people * IMAGES)
    identity = np.random.default_rng(0).integers(0, IDENTITIES, people * IMAGES)
    return embeddings, jnp.repeat(jnp.asarray(identity, jnp.int32), POSITIVES_PER_LEVEL)


def _compiled(function: Callable[..., Any], *args: Any) -> Work:
    """A call of a pure function, compiled for these arguments."""
    args = jax.device_put(args)
    compiled = jax.jit(function).lower(*args).compile()
    return Work(partial(compiled, *args), peak_memory(compiled))
