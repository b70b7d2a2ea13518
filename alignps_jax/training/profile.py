"""Traces of chosen training steps, for TensorBoard and Perfetto (`jax.profiler`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from alignps_jax.types import UserError

_STEPS = re.compile(r"(\d+):(\d+)")


class Profiler:
    """Traces the steps "first:last" of `config.train.profile` into a folder; None traces nothing.

    Attributes:
      folder: where TensorBoard's profile plugin finds the trace.
    """

    def __init__(self, steps: str | None, folder: Path):
        self._first, self._last = traced_steps(steps) if steps else (0, -1)
        self.folder = folder
        self._traces = False

    def begin(self, step: int) -> None:
        """Before a step is dispatched."""
        if not self._traces and self._first <= step <= self._last:
            jax.profiler.start_trace(self.folder)
            self._traces = True

    def end(self, step: int, results: Any) -> bool:
        """After it; True once the last step's `results` are there and the trace is written."""
        if not self._traces or step < self._last:
            return False
        jax.block_until_ready(results)
        jax.profiler.stop_trace()
        self._traces = False
        return True


def traced_steps(steps: str) -> tuple[int, int]:
    """First and last step; UserError unless `steps` is "first:last", from 1."""
    found = _STEPS.fullmatch(steps)
    if found:
        first, last = int(found[1]), int(found[2])
        if 1 <= first <= last:
            return first, last
    raise UserError(
        f'config.train.profile: found {steps!r}, expected "first:last", such as 100:105'
    )
