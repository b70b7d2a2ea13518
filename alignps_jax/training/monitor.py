"""What a run shows and writes of its training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignps_jax.devices import device_names, peak_memory
from alignps_jax.distributed import is_main_process
from alignps_jax.log import MetricLog, progress
from alignps_jax.training.optimizer import Schedule
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import Batch, UserError
from data_pipeline.pipeline import TrainPipeline

# How the line begins that says when the losses of the first step were there.
FIRST_STEP = "first step done"


class Monitor:
    """Shows and logs the training steps, and stops at what is not finite; a context manager.

    The devices never wait for the host, which dispatches a step while the one before it runs, but
    at the steps that are logged or saved: there it reads all that was measured since.

    Args:
      pipeline: of the batches.
      schedule: the learning rate at a step.
      log: where the measurements go.
      start, total: first and last step.
      log_every: steps between two lines of the log.
      profile: "first:last", the steps to trace with jax.profiler into `folder`.
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
        self._pipeline, self._log = pipeline, log
        self._total, self._log_every, self._logged = total, log_every, start
        self._first, self._last = map(int, (profile or "0:0").split(":"))
        self._folder, self._traces = folder, False
        # On the host: later, a value from the device would wait for the steps under way.
        self._rates = np.asarray(jax.vmap(schedule)(jnp.arange(total)))
        self._unread: list[tuple[int, StepMetrics]] = []
        self._shapes: set[tuple[int, ...]] = set()
        self._bar = progress(
            desc="train", unit="step", total=total, initial=start, disable=not is_main_process()
        )
        self.say(f"training on {device_names()}")
        self._begun: float | None = time.perf_counter()
        self.restart_clock()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._traces:
            jax.profiler.stop_trace()
        self._bar.close()

    def restart_clock(self) -> None:
        """Forgets the time that has passed since the last line of the log."""
        self._since, self._waited = time.perf_counter(), 0.0

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if is_main_process():
            self._bar.write(message)

    def next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        """The batch of a step; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        height, width = shape = batch.image.shape[1:3]
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.say(
                f"compiling the training step for {height}x{width} images "
                f"({len(self._shapes)} of at most {len(self._pipeline.buckets)} shapes)"
            )
        if not self._traces and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._traces = True
        return batch

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step that was dispatched, and waits for the one before it."""
        if self._unread:
            jax.block_until_ready(self._unread[-1])
        self._unread.append((step, metrics))
        self._bar.update()
        if self._begun or self._traces or step % self._log_every == 0 or step == self._total:
            self.flush()
        if self._traces and step >= self._last:
            jax.profiler.stop_trace()
            self._traces = False
            self.say(f"profile     {self._folder}")

    def flush(self) -> None:
        """Waits for the last recorded step, checks what was measured, and logs it where it is due.

        Raises:
          UserError: a loss term or the gradient is not finite.
        """
        measured, self._unread = jax.device_get(self._unread), []
        for step, metrics in measured:
            self._check_finite(step, metrics)
        if measured and self._begun:
            seconds = time.perf_counter() - self._begun
            self.say(f"{FIRST_STEP} after {seconds:.1f} s, compilation included")
            self._begun = None
        if measured and (step % self._log_every == 0 or step == self._total):
            self._report(step, metrics)

    def _report(self, step: int, metrics: StepMetrics) -> None:
        seconds, loss = time.perf_counter() - self._since, float(sum(metrics.terms.values()))
        rate = (step - self._logged) * self._pipeline.batch_size / seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:.1f} images/s", refresh=False)
        values: dict[str, Any] = {"loss": loss} | {
            f"loss/{name}": x for name, x in metrics.terms.items()
        }
        values |= {
            "learning_rate": self._rates[step - 1],
            "grad_norm": metrics.grad_norm,
            "update_norm": metrics.update_norm,
            "param_norm": metrics.param_norm,
            "positives": metrics.positives,
            "dropped_positives": metrics.dropped_positives,
            "epoch": step / self._pipeline.steps_per_epoch,
            "images_per_second": rate,
            "data_wait": self._waited / seconds,
            "padding": self._pipeline.plan(step - 1).padding,
        } | peak_memory()
        self._log.scalars(step, values)
        self._logged = step
        self.restart_clock()

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
