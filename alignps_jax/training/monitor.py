"""What a run shows and logs of its training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from alignps_jax.devices import device_names, peak_memory
from alignps_jax.distributed import is_main_process
from alignps_jax.log import MetricLog, progress
from alignps_jax.training.setup import Run
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import Batch, UserError


class Monitor:
    """Shows and logs the training steps, and stops at what is not finite.

    A step is dispatched while the one before it runs; only those logged or saved are read.
    """

    def __init__(self, run: Run, log: MetricLog, start: int):
        self._pipeline, self._log, self._plan = run.pipeline, log, (plan := run.plan)
        self._schedule = jax.jit(run.schedule)  # one program, not one for each operation
        first, last = map(int, (plan.profile or "0:0").split(":"))
        self._traced = range(max(first, start + 1), min(last, plan.total) + 1)
        self._unread: list[tuple[int, StepMetrics]] = []
        self._shapes: set[tuple[int, ...]] = set()
        about = {"total": plan.total, "initial": start, "disable": not is_main_process()}
        self._bar = progress(None, desc="train", unit="step", **about)
        self.say(f"training on {device_names()}")
        self._begun: float | None = time.perf_counter()
        self.restart_clock()

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def restart_clock(self) -> None:
        """Forgets the steps, and the time, since the last line of the log."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def say(self, message: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if is_main_process():
            (self._bar.write if sys.stderr.isatty() else print)(message)

    def next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        """The batch of a step; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        height, width = shape = batch.image.shape[1:3]
        if shape not in self._shapes:
            self._shapes.add(shape)
            count = f"{len(self._shapes)} of at most {len(self._pipeline.buckets)} shapes"
            self.say(f"compiling the training step for {height}x{width} images ({count})")
        if step in self._traced[:1]:
            jax.profiler.start_trace(self._log.workdir / "profile")
        return batch

    def record(self, step: int, metrics: StepMetrics) -> None:
        """Takes note of a step that was dispatched, and waits for the one before it."""
        if self._unread:
            jax.block_until_ready(self._unread[-1])
        self._unread.append((step, metrics))
        self._steps += 1
        self._bar.update()
        if self._begun or step in self._traced[-1:] or self._plan.logs_at(step):
            self.flush()
        if step in self._traced[-1:]:
            jax.profiler.stop_trace()
            self.say(f"profile     {self._log.workdir / 'profile'}")

    def flush(self) -> None:
        """Waits for the last step, and logs what is due; UserError for what is not finite."""
        measured, self._unread = jax.device_get(self._unread), []
        if self._begun:
            seconds, self._begun = time.perf_counter() - self._begun, None
            self.say(f"first step done after {seconds:.1f} s, compilation included")
        for step, metrics in measured:
            values = {f"loss/{name}": value for name, value in metrics.terms.items()}
            values["grad_norm"] = metrics.grad_norm
            if bad := ", ".join(name for name, x in values.items() if not np.isfinite(x)):
                images = self._pipeline.names(self._pipeline.plan(step - 1).indices)
                raise UserError(
                    f"step {step}: {bad} not finite, on the images {', '.join(images)}; training "
                    "stops, the last checkpoint stays"
                )
            if self._plan.logs_at(step):
                self._report(step, metrics, values)

    def _report(self, step: int, metrics: StepMetrics, values: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self._since
        values |= {
            "loss": float(sum(metrics.terms.values())),
            "positives": metrics.positives,
            "dropped_positives": metrics.dropped_positives,
            "learning_rate": self._schedule(step - 1),
            "epoch": step / self._pipeline.steps_per_epoch,
            "images_per_second": self._steps * self._pipeline.batch_size / seconds,
            "data_wait": self._waited / seconds,
            **peak_memory(),
        }
        shown = "loss {loss:.3f}, {images_per_second:.1f} images/s".format_map(values)
        self._bar.set_postfix_str(shown, refresh=False)
        self._log.scalars(step, values)
        self.restart_clock()
