"""The log of a run: a line of JSON per logged step, TensorBoard beside it, and progress bars."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from alignps_jax.distributed import is_main_process

_SECONDS_PER_LINE = 30.0  # of progress in a log file
_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm with these options: a bar on a terminal, now and then a line in a log file."""
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    pauses = dict.fromkeys(("delay", "mininterval", "maxinterval"), _SECONDS_PER_LINE)
    return tqdm(iterable, bar_format=_LINE, miniters=1, **pauses, **options)


@dataclasses.dataclass(frozen=True)
class LogLine:
    """One line of the log; NaN is a measurement that was not finite."""

    step: int
    values: Mapping[str, float]

    def encode(self) -> bytes:
        """The line in the file."""
        numbers = {name: x if math.isfinite(x) else None for name, x in self.values.items()}
        return json.dumps({"step": self.step} | numbers).encode() + b"\n"


def read_log(path: Path) -> tuple[LogLine, ...]:
    """Reads a log that `MetricLog` wrote, without a last line that was cut off.

    A note names lines that are left out.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            content = json.loads(line)
            step = int(content.pop("step"))
            values = {name: math.nan if x is None else float(x) for name, x in content.items()}
            lines.append(LogLine(step, values))
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            print(f"note: {path}, line {number}: found {line[:60]!r}, which is left out")
    return tuple(lines)


class MetricLog:
    """Appends to `<workdir>/log.jsonl` and `<workdir>/tensorboard`, in process 0 alone.

    A line is on the disk when `scalars` returns. A context manager.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir, self._path = workdir, workdir / "log.jsonl"
        self._writes = is_main_process()
        if self._writes:
            (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
            # In this thread: a full disk kills that of `SummaryWriter`, and training would wait.
            events = str(workdir / "tensorboard" / "events")
            self._events = EventsWriter(events, f".{time.time_ns()}")
            self._path.touch()
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writes and error[0] is None:  # a full disk would say so again
            self._events.close()

    def truncate_after(self, step: int, *, again: str | tuple[str, ...] = ()) -> None:
        """Removes what was measured after `step`, for training that resumes there.

        Lines of `step` itself with a name that begins with `again` go too.
        """
        if self._writes:
            kept = [
                line.encode()
                for line in read_log(self._path)
                if line.step < step + (not any(name.startswith(again) for name in line.values))
            ]
            temporary = self._path.with_name("log.jsonl.tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self._path)
            start = SessionLog(status=SessionLog.START)  # hides later steps of earlier files
            self._events.write_event(Event(step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become `null` there."""
        if self._writes:
            line = LogLine(int(step), {name: float(value) for name, value in values.items()})
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self._show(step, *(summary.scalar(name, x) for name, x in line.values.items()))

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an RGB picture in TensorBoard."""
        if self._writes:
            self._show(step, summary.image(name, image, dataformats="HWC"))

    def _show(self, step: int, *contents: Any) -> None:
        for content in contents:
            self._events.write_event(Event(step=int(step), summary=content, wall_time=time.time()))
        self._events.flush()
