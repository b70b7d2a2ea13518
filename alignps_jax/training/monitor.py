"""What a run shows and writes of its training steps."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignps_jax.devices import device_names, peak_memory
from alignps_jax.distributed import is_main_process
from alignps_jax.log import MetricLog, on_terminal, progress
from alignps_jax.training.optimizer import Schedule
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import Batch, UserError
from data_pipeline.pipeline import TrainPipeline

# How the line begins that says when the losses of the first step were there.
FIRST_STEP = "first step done"


def traced_steps(steps: str | None) -> tuple[int, int]:
    """First and last step of `config.train.profile`; UserError unless it is "first:last"."""
    found = re.fullmatch(r"(\d+):(\d+)", steps or "0:0")
    if not found or (steps and not 1 <= int(found[1]) <= int(found[2])):
        raise UserError(
            f'config.train.profile: found {steps!r}, expected "first:last", such as 100:105'
        )
    return int(found[1]), int(found[2])


class Monitor:
    """Shows and logs the training steps, and stops at what is not finite; a context manager.

    The loop waits for each step once the next one is dispatched, so that the devices never wait
    for it, and reads what they measured only where it is logged or saved.
    """

    def __init__(
        self,
        pipeline: TrainPipeline,
        schedule: Schedule,
        log: MetricLog,
        *,
        start: int,
        total: int,
        log_every: int,
        profile: str | None = None,
        folder: Path = Path("profile"),
    ):
        self._pipeline, self._log, self._total = pipeline, log, total
        self._log_every, self._trace, self._folder = log_every, traced_steps(profile), folder
        self._rates = np.asarray(jax.vmap(schedule)(jnp.arange(total)))  # nothing is trained yet
        self._bar = progress(
            desc="train", unit="step", total=total, initial=start, disable=not is_main_process()
        )
        self.say(f"training on {device_names()}")
        self._step, self._traces = start, False
        self._unread: list[tuple[int, StepMetrics]] = []
        # A thread notes when a step is done; dispatching the next one may take longer.
        self._clock = ThreadPoolExecutor(1)
        self._done: Future[float] | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._begun: float | None = time.perf_counter()
        self.restart_clock()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._traces:
            jax.profiler.stop_trace()
        self._clock.shutdown()
        self._bar.close()

    def restart_clock(self) -> None:
        """Forgets the time that has passed since the last line of the log."""
        self._since, self._waited, self._logged = time.perf_counter(), 0.0, self._step

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if is_main_process():
            (self._bar.write if on_terminal() else print)(message)
            sys.stdout.flush()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        shape = batch.image.shape[1:3]
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.say(
                f"compiling the training step for {shape[0]}x{shape[1]} images "
                f"({len(self._shapes)} of at most {len(self._pipeline.buckets)} shapes)"
            )
        if not self._traces and self._trace[0] <= self._step + 1 <= self._trace[1]:
            jax.profiler.start_trace(self._folder)
            self._traces = True
        return batch

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step that was dispatched, and waits for the one before it."""
        self._wait()
        self._step, self._done = step, self._clock.submit(_when_done, metrics)
        self._unread.append((step, metrics))
        if self._traces and step == self._trace[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._traces = False
            self.say(f"profile     {self._folder}")

    def flush(self) -> None:
        """Waits for the last recorded step, and checks all that is not checked yet.

        Raises:
          UserError: a loss term or the gradient is not finite.
        """
        self._wait()
        self._read()

    def _wait(self) -> None:
        """Waits for the last recorded step, and logs it where it is due."""
        if self._done is None:
            return
        done, self._done = self._done.result(), None
        self._bar.update()
        if self._begun is not None:
            self.say(f"{FIRST_STEP} after {done - self._begun:.1f} s, compilation included")
            self._begun = None
        if self._step % self._log_every == 0 or self._step == self._total:
            self._report(self._read()[-1], done)

    def _read(self) -> list[StepMetrics]:
        """What was measured since it was read last; all of it is finite."""
        steps, self._unread = jax.device_get(self._unread), []
        for step, metrics in steps:
            self._check_finite(step, metrics)
        return [metrics for _, metrics in steps]

    def _report(self, metrics: StepMetrics, done: float) -> None:
        step, seconds, loss = self._step, done - self._since, float(sum(metrics.terms.values()))
        rate = (step - self._logged) * self._pipeline.batch_size / seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:.1f} images/s", refresh=False)
        values = (
            {"loss": loss, **_by_name(metrics)}
            | {
                "learning_rate": self._rates[step - 1],
                "epoch": step / self._pipeline.steps_per_epoch,
                "images_per_second": rate,
                "data_wait": min(1.0, self._waited / seconds),
                "padding": self._pipeline.plan(step - 1).padding,
            }
            | peak_memory()
        )
        self._log.scalars(step, values)
        self._since, self._waited, self._logged = done, 0.0, step

    def _check_finite(self, step: int, metrics: StepMetrics) -> None:
        named = {f"loss/{name}": value for name, value in metrics.terms.items()}
        named["grad_norm"] = metrics.grad_norm
        bad = [name for name, value in named.items() if not np.isfinite(value)]
        if bad:
            images = self._pipeline.names(self._pipeline.plan(step - 1).indices)
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite, on the images {', '.join(images)}; "
                "training stops, the last checkpoint stays"
            )


def _by_name(metrics: StepMetrics) -> dict[str, Any]:
    values = {field.name: getattr(metrics, field.name) for field in dataclasses.fields(metrics)}
    return {f"loss/{name}": x for name, x in values.pop("terms").items()} | values


def _when_done(metrics: StepMetrics) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()
