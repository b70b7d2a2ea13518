"""What watches over the training loop: progress, and finite losses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from alignps_jax.devices import device_names, peak_memory
from alignps_jax.log import MetricLog
from alignps_jax.progress import progress
from alignps_jax.training.optimizer import Schedule
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import Batch, UserError
from data_pipeline.pipeline import TrainPipeline
from data_pipeline.transforms import Size

# How the line begins that says when the losses of the first step were there.
FIRST_STEP = "first step done"


class Monitor:
    """Shows and logs the training steps, and stops at what is not finite; a context manager.

    Only the first process shows progress; all of them check and log.
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
    ):
        self._pipeline, self._log = pipeline, log
        self._schedule: Any = schedule  # of the step, a Python number
        self._total, self._log_every = total, log_every
        self._leads = jax.process_index() == 0
        self._bar = progress(
            desc="train", unit="step", total=total, initial=start, disable=not self._leads
        )
        self.say(f"training on {device_names()}")
        self._pending: tuple[int, StepMetrics] | None = None
        self._start: float | None = time.perf_counter()
        self.restart_clock()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def restart_clock(self) -> None:
        """Forgets the time that has passed since the last line of the log."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def compiles(self, size: Size, count: int) -> None:
        """Says that the `count`th program is being compiled, for images of this size."""
        height, width = size
        self.say(
            f"compiling the training step for {height}x{width} images "
            f"({count} of at most {len(self._pipeline.buckets)} programs)"
        )

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self._leads:
            self._bar.write(message)

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step that was dispatched, and reports the one before it.

        Reading the metrics of a step only once the next one is dispatched keeps the devices busy:
        that one's batch travels to them while they still compute.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the metrics of the last recorded step; checks, shows and logs them.

        Raises:
          UserError: a loss term or the gradient is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        self._check_finite(step, metrics)
        if self._start is not None:
            seconds = time.perf_counter() - self._start
            self.say(f"{FIRST_STEP} after {seconds:.1f} s, compilation included")
            self._start = None
        self._steps += 1
        self._bar.update()
        if step % self._log_every == 0 or step == self._total:
            self._report(step, metrics)

    def _report(self, step: int, metrics: StepMetrics) -> None:
        elapsed = time.perf_counter() - self._since
        loss = float(sum(metrics.terms.values()))
        rate = self._steps * self._pipeline.batch_size / elapsed
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:.1f} images/s", refresh=False)
        values: dict[str, Any] = {"loss": loss} | {
            f"loss/{name}": x for name, x in metrics.terms.items()
        }
        values |= {
            "learning_rate": self._schedule(step - 1),
            "grad_norm": metrics.grad_norm,
            "update_norm": metrics.update_norm,
            "param_norm": metrics.param_norm,
            "positives": metrics.positives,
            "dropped_positives": metrics.dropped_positives,
            "epoch": step / self._pipeline.steps_per_epoch,
            "images_per_second": rate,
            "data_wait": self._waited / elapsed,
            "padding": self._pipeline.plan(step - 1).padding,
        } | peak_memory()
        self._log.scalars(step, values)
        self.restart_clock()

    def _check_finite(self, step: int, metrics: StepMetrics) -> None:
        named: dict[str, Float[Array, ""]] = {
            f"loss/{name}": value for name, value in metrics.terms.items()
        }
        named["grad_norm"] = metrics.grad_norm
        bad = [name for name, value in named.items() if not np.isfinite(value)]
        if bad:
            images = self._pipeline.names(self._pipeline.plan(step - 1).indices)
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite, on the images {', '.join(images)}; "
                "training stops, the last checkpoint stays"
            )
