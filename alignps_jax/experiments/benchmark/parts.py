"""The parts of `--mode=benchmark`, each as the pieces of work that it times.

They are the product as it is used: on all devices, from the host's memory to results, with the
batch sizes and the largest scales of the configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alignps_jax import devices
from alignps_jax.evaluation.metrics import detection_metrics, search_metrics
from alignps_jax.experiments.benchmark import simulate
from alignps_jax.experiments.benchmark.measure import Work, compiled, peak_memory
from alignps_jax.gallery.nearest import top_k
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.nn.model import build_model
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.state import create_state, is_frozen, max_positives
from alignps_jax.training.step import TrainStep
from configs import tiny
from data_pipeline.pipeline import TrainPipeline, make_eval_batches, make_train_pipeline

IDENTITIES = 5532  # CUHK-SYSU's, where the configuration leaves it to the data set
PEOPLE = 6  # per photo
GALLERY, QUERIES, RESULTS, EMBEDDING = 1_000_000, 100, 10, 256
TEST = 6112, 2057, 450  # images, queries and identities of PRW's test set


@dataclasses.dataclass(frozen=True)
class Context:
    """What is measured: timed runs of every work; `quick` only shows that it works."""

    config: ConfigDict
    runs: int
    quick: bool

    def usable_config(self) -> ConfigDict:
        """A copy to change that needs no files and fits the devices (quick: a tiny one)."""
        config = tiny.get_config() if self.quick else ConfigDict(self.config.to_dict())
        config.loss.lut_size = config.loss.lut_size or IDENTITIES
        config.data.train_scales = (max(config.data.train_scales, key=np.prod),)
        count = jax.device_count()
        for section in (config.train, config.eval):
            section.batch_size = -(-section.batch_size // count) * count
        return config


def inference(context: Context) -> list[Work]:
    """Photos at the test scale to detections: one per device, and the batch of an evaluation."""
    config = context.usable_config()
    step = make_predict_step(config)
    weights = devices.replicate(simulate.plausible_weights(step.model))
    predict = devices.parallel_predict_step(step)
    long, short = config.data.test_scale
    works = []
    for images in sorted({jax.device_count(), config.eval.batch_size}):
        split = simulate.made_up_split(images, (short, long), people=PEOPLE)
        batch = next(iter(make_eval_batches(split, config.data, batch_size=images)))
        args = (*weights, devices.split_over_devices(batch))
        program, seconds = compiled(predict, *args)
        name, run = f"{long}×{short}, batch {images}", partial(program, *args)
        works.append(Work(name, run, images, "photos", peak_memory(program), seconds))
    return works


def train(context: Context) -> list[Work]:
    """The training step."""
    config = context.usable_config()
    pipeline, images = _train_pipeline(config), config.train.batch_size
    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1000)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    step = TrainStep(
        model, optimizer, config.loss, max_positives(config, pipeline), config.model.precision
    )
    state = create_state(config, model, optimizer, config.loss.lut_size)
    params, frozen = simulate.as_if_trained(state.params, state.frozen)
    state = dataclasses.replace(state, params=params, frozen=frozen)
    # Donation takes the buffers, so no two leaves may share one.
    state = devices.replicate(jax.tree.map(jnp.copy, state))
    batch = devices.split_over_devices(pipeline.batch(0))
    program, seconds = compiled(devices.parallel_train_step(step), state, batch)

    def run() -> object:
        nonlocal state
        state, metrics = program(state, batch)
        return state, metrics

    return [Work(_title(config), run, images, "photos", peak_memory(program), seconds)]


def data(context: Context) -> list[Work]:
    """Training batches from JPEG bytes: by one thread, and by all workers."""
    config, works = context.usable_config(), []
    count = 3 * max(config.data.workers, 1)  # batches; every worker makes some
    for workers in sorted({1, max(config.data.workers, 1)}):
        config.data.workers = workers
        pipeline = _train_pipeline(config)
        name = f"{count} times {_title(config)}, {workers} worker{'s' if workers > 1 else ''}"
        images = count * config.train.batch_size
        works.append(Work(name, partial(_drain, pipeline, count), images, "photos"))
    return works


def search(context: Context) -> list[Work]:
    """Exact search in a large gallery of embeddings."""
    rng, count = np.random.default_rng(0), 1000 if context.quick else GALLERY
    rows = (rng.normal(size=(number, EMBEDDING)) for number in (QUERIES, count))
    args = [jnp.asarray(simulate.unit_rows(each)) for each in rows]
    program, seconds = compiled(jax.jit(partial(top_k, k=RESULTS)), *args)
    name, run = f"{QUERIES} people among {count:,}", partial(program, *args)
    return [Work(name, run, QUERIES, "queries", peak_memory(program), seconds)]


def evaluate(context: Context) -> list[Work]:
    """All metrics of a test set, from its detections."""
    images, queries, identities = (60, 20, 10) if context.quick else TEST
    people = simulate.made_up_people(images, (900, 1500), people=4, identities=identities)
    protocol = simulate.made_up_protocol(people, queries)
    found = simulate.made_up_detections(people, EMBEDDING)

    def run() -> object:
        return (
            detection_metrics(people, found, score_threshold=0.2),
            search_metrics(protocol, found, score_threshold=0.2),
        )

    name = f"{len(protocol.query_image):,} queries in {images:,} photos"
    return [Work(name, run, len(protocol.query_image), "queries")]


# In the order in which they run and are reported.
PARTS: dict[str, Callable[[Context], Sequence[Work]]] = {
    "inference": inference,
    "train": train,
    "data": data,
    "search": search,
    "evaluate": evaluate,
}


def _train_pipeline(config: ConfigDict) -> TrainPipeline:
    """The road from JPEG bytes to batches; the photos need not be resized."""
    (long, short), batch_size = config.data.train_scales[0], config.train.batch_size
    split = simulate.made_up_split(2 * batch_size, (short, long), people=PEOPLE)
    return make_train_pipeline(split, config.data, seed=0, batch_size=batch_size)


def _drain(pipeline: TrainPipeline, batches: int) -> None:
    for _ in pipeline.iterator(batches):
        pass


def _title(config: ConfigDict) -> str:
    (long, short), images = config.data.train_scales[0], config.train.batch_size
    return f"{long}×{short}, batch {images}"
