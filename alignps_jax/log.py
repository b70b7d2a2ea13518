"""The log of a run: a line of JSON per logged step, TensorBoard beside it, and progress bars."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from alignps_jax.distributed import is_main_process

_FLUSH_SECONDS = 10.0
# Progress in a log file.
_SECONDS_PER_LINE = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm with these options: a bar on a terminal, now and then a line in a log file."""
    if on_terminal():
        return tqdm(iterable, dynamic_ncols=True, **options)
    pauses = dict.fromkeys(("delay", "mininterval", "maxinterval"), _SECONDS_PER_LINE)
    return tqdm(iterable, bar_format=_LINE, miniters=1, **pauses, **options)


def on_terminal() -> bool:
    """Whether progress bars are drawn on a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@dataclasses.dataclass(frozen=True)
class LogLine:
    """The measurements of one line of the log; NaN stands for one that was not finite."""

    step: int
    values: Mapping[str, float]


def read_log(path: Path) -> tuple[LogLine, ...]:
    """Reads a log that `MetricLog` wrote; a last line that was cut off is left out."""
    return tuple(line for _, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, LogLine]]:
    """The complete lines; a note names those that are none of a log."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            content = json.loads(line)
            step = int(content.pop("step"))
            values = {name: math.nan if x is None else float(x) for name, x in content.items()}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            print(f"note: {path}, line {number}: found {line[:60]!r}, which is left out")
            continue
        yield line, LogLine(step, values)


class MetricLog:
    """Appends measurements to `<workdir>/log.jsonl` and to `<workdir>/tensorboard`.

    Process 0 alone writes. Every line is with the system when `scalars` returns, so that a killed
    process loses none. A context manager.
    """

    def __init__(self, workdir: Path) -> None:
        self._path, self._folder = workdir / "log.jsonl", workdir / "tensorboard"
        self._events: EventsWriter | None = None
        self._writes, self._first, self._flushed = is_main_process(), 0, time.monotonic()
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written is not tried once more at the end.
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(self._path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writes:
            self._file.close()
        if self._events:
            with contextlib.suppress(*([OSError] if error[0] else [])):  # a full disk says so again
                self._events.close()

    def sync(self) -> None:
        """Sees that what was measured is on the disk itself, as what is saved next will be."""
        if self._writes:
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int, *, again: str = "") -> None:
        """Removes what was measured after `step`, for training that resumes there.

        Of the lines of `step` itself, those go whose names begin with `again`: what they say is
        measured once more.
        """
        self._first = step + 1
        if self._writes:
            kept = [line for line, content in _lines(self._path) if _stays(content, step, again)]
            temporary = self._path.with_name("log.jsonl.tmp")
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            temporary.replace(self._path)
            self._file.close()
            self._file = self._path.open("ab", buffering=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become `null` there."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        rest = memoryview(json.dumps({"step": int(step)} | line).encode() + b"\n")
        if self._writes:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        for name, value in numbers.items():
            self._show(step, summary.scalar(name, value))

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an RGB picture in TensorBoard."""
        self._show(step, summary.image(name, image, dataformats="HWC"))

    def _show(self, step: int, content: Any) -> None:
        """Writes to TensorBoard, in this thread: the one of its `SummaryWriter` hides errors."""
        if not self._writes:
            return
        if self._events is None:
            name = str(self._folder / "events")
            self._events = EventsWriter(name, f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)  # hides later steps of earlier files
            self._events.write_event(Event(step=self._first, session_log=start))
        event = Event(step=int(step), summary=content, wall_time=time.time())
        self._events.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()


def _stays(line: LogLine, step: int, again: str) -> bool:
    repeated = again and any(name.startswith(again) for name in line.values)
    return line.step < step or (line.step == step and not repeated)
