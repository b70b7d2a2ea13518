"""The data road: from JPEG bytes to batches, and how long the training loop waits for it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import jax
from ml_collections import ConfigDict

from alignps_jax.devices import parallel_train_step, replicate, split_over_devices
from alignps_jax.experiments.benchmark.measure import Timing, time_in_turns
from alignps_jax.experiments.benchmark.simulate import made_up_split
from alignps_jax.log import MetricLog, read_log
from alignps_jax.nn.model import build_model
from alignps_jax.training.monitor import Monitor
from alignps_jax.training.optimizer import Schedule, learning_rate_schedule, make_optimizer
from alignps_jax.training.setup import Plan
from alignps_jax.training.state import create_state, is_frozen, max_positives
from alignps_jax.training.step import StepMetrics, TrainStep
from alignps_jax.types import Batch
from configs import synthetic
from data_pipeline.pipeline import TrainPipeline, make_train_pipeline
from data_pipeline.transforms import Size, decode_jpeg
from tests.benchmark.measure import Context, Row

# (height, width) of photos: as large as the network takes them, PRW's, and many of CUHK-SYSU's.
PHOTOS: tuple[Size, ...] = ((900, 1500), (1080, 1920), (600, 800))
SCALE = (1500, 900)
WORKERS = (1, 2)
BATCH = 4
LOOP_STEPS = 30


def rows(context: Context) -> Iterator[Row]:
    """Decoding, the whole road, several workers, and a training loop that is fed by it."""
    sizes = PHOTOS[:1] if context.quick else PHOTOS
    for size in sizes:
        yield from _one_core(context, size)
    yield from _workers(context, PHOTOS[0])
    if not context.quick:  # compiling the step takes too long
        yield _training_loop()


def _pipeline(context: Context, size: Size, *, photos: int, workers: int) -> TrainPipeline:
    """Batches of photos of that size at the test scale, flipped as the configuration says."""
    data = ConfigDict(context.config.data.to_dict())
    data.train_scales = ((150, 90),) if context.quick else (SCALE,)
    data.workers = workers
    small = (size[0] // 10, size[1] // 10) if context.quick else size
    return make_train_pipeline(made_up_split(photos, small), data, seed=0, batch_size=BATCH)


def _one_core(context: Context, size: Size) -> Iterator[Row]:
    """One photo in one thread: decoded; resized as well; and everything."""
    pipeline = _pipeline(context, size, photos=2 * BATCH, workers=0)
    steps = range(pipeline.steps_per_epoch)
    plans = [pipeline.plan(step) for step in steps]
    jpegs, sizes = pipeline.reader.split.jpegs, pipeline.reader.split.sizes
    photo_size = (int(sizes[0][0]), int(sizes[0][1]))  # of all of them
    work = [
        (jpegs[index], (int(height), int(width)))
        for plan in plans
        for index, (height, width) in zip(plan.indices, plan.sizes, strict=True)
    ]

    def decode() -> None:
        for jpeg, _ in work:
            decode_jpeg(jpeg, "photo", photo_size)

    def decode_and_resize() -> None:
        for jpeg, (height, width) in work:
            cv2.resize(decode_jpeg(jpeg, "photo", photo_size), (width, height))

    def everything() -> None:
        for step in steps:
            pipeline.batch(step)

    cv2.setNumThreads(0)  # as in training, where every worker is one thread
    times = time_in_turns(
        {"decode": decode, "resize": decode_and_resize, "all": everything}, runs=context.runs
    )
    times = {name: time.divided(len(work)) for name, time in times.items()}
    (height, width), resized = size, work[0][1]
    name = f"{width}x{height} photo"
    floor = times["resize"].median
    throughput = floor / times["all"].median
    yield Row("data", f"decode a {name}", times["decode"])
    yield Row("data", f"decode and resize to {resized[1]}x{resized[0]}", times["resize"])
    yield Row(
        "data",
        f"decode, resize, flip, pad a {name}",
        times["all"],
        floor=floor,
        goal="≥ 85% of the throughput of decode and resize",
        note=f"{throughput:.0%} of it, in batches of {BATCH}, one thread",
    )


def _workers(context: Context, size: Size) -> Iterator[Row]:
    """The same by threads: the floor is one thread's time over their number, or that of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batches = 3 if context.quick else 24
    pipelines = {
        workers: _pipeline(context, size, photos=2 * BATCH, workers=workers) for workers in WORKERS
    }

    def drain(pipeline: TrainPipeline) -> Callable[[], None]:
        def run() -> None:
            for _ in pipeline.iterator(batches):
                pass

        return run

    times = time_in_turns(
        {str(workers): drain(pipeline) for workers, pipeline in pipelines.items()},
        runs=context.runs,
    )
    one = times["1"].median / batches / BATCH
    for workers in WORKERS:
        time = times[str(workers)].divided(batches * BATCH)
        yield Row(
            "data",
            f"a photo, {workers} {'worker' if workers == 1 else 'workers'}",
            time,
            floor=one / min(workers, cores),
            goal="as many times faster as there are workers and cores",
            note=f"{1 / time.median:.0f} images/s, {one / time.median:.2f} times one worker's",
        )


def _training_loop() -> Row:
    """The demo's network on photos of CUHK-SYSU's size: the share of the time that it waits.

    The demo's, because it takes a fraction of the paper's time for an image: it is the harder
    one to feed.
    """
    config = synthetic.get_config()
    images = config.train.batch_size = 8 * jax.device_count()
    height, width = PHOTOS[-1]
    pipeline = make_train_pipeline(
        made_up_split(2 * images, PHOTOS[-1]), config.data, seed=0, batch_size=images
    )
    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, pipeline.steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    step_fn = parallel_train_step(
        TrainStep(model, optimizer, config.loss, max_positives(config, pipeline))
    )
    identities = pipeline.reader.split.annotations.num_identities
    state = replicate(create_state(config, model, optimizer, identities))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        speed = fed_steps(step_fn, state, pipeline, schedule, LOOP_STEPS)
    return Row(
        "data",
        "wait of a training step for its batch",
        Timing.of([speed.wait]),
        goal="data_wait < 3%",
        note=f"data_wait {speed.wait / speed.step:.2%} of {LOOP_STEPS} steps of "
        f"{1e3 * speed.step:.0f} ms each: {config.model.backbone}, {images} photos of "
        f"{width}x{height}, {config.data.workers} worker",
    )


@dataclasses.dataclass(frozen=True)
class FedSteps:
    """Seconds of a training step, and those of them that it waited for data; means."""

    step: float
    wait: float


def fed_steps(
    step_fn: Callable[[Any, Batch], tuple[Any, StepMetrics]],
    state: Any,
    pipeline: TrainPipeline,
    schedule: Schedule,
    steps: int,
) -> FedSteps:
    """Trains for some steps as `train_and_evaluate` does, and reads the log.

    The steps before, one of which compiles, do not count.
    """
    settled = 3
    total = settled + steps
    plan = Plan(total, checkpoint_every=total, eval_every=total, log_every=total)
    batches = pipeline.iterator(total)
    with tempfile.TemporaryDirectory() as folder:
        with (
            MetricLog(Path(folder)) as log,
            contextlib.closing(Monitor(pipeline, schedule, log, plan, start=0)) as monitor,
        ):
            for step in range(1, total + 1):
                batch = monitor.next_batch(batches, step)
                state, metrics = step_fn(state, split_over_devices(batch))
                monitor.record(step, metrics)
                if step == settled:
                    monitor.flush()
                    monitor.restart_clock()
            monitor.flush()
        found = read_log(Path(folder) / "log.jsonl")[-1].values
    step_time = pipeline.batch_size / found["images_per_second"]
    return FedSteps(step=step_time, wait=found["data_wait"] * step_time)
