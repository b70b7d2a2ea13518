"""The log of a run: a line of JSON per logged step, TensorBoard beside it, and progress bars."""

from __future__ import annotations

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

Line = tuple[int, Mapping[str, float]]  # a step, and what was measured; NaN if not finite

_SECONDS_PER_LINE = 30.0  # of progress in a log file
_BAR = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm with these options: a bar on a terminal, now and then a line in a log file."""
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    pauses = dict.fromkeys(("delay", "mininterval", "maxinterval"), _SECONDS_PER_LINE)
    return tqdm(iterable, bar_format=_BAR, miniters=1, **pauses, **options)


def read_log(path: Path) -> tuple[Line, ...]:
    """Reads a log of `MetricLog`, without a last line that was cut off; a note names bad lines."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            content = json.loads(line)
            step = int(content.pop("step"))
            values = {name: math.nan if x is None else float(x) for name, x in content.items()}
            lines.append((step, values))
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            print(f"note: {path}, line {number}: found {line[:60]!r}, which is left out")
    return tuple(lines)


def _encoded(step: int, values: Mapping[str, float]) -> bytes:
    numbers = {name: x if math.isfinite(x) else None for name, x in values.items()}
    return json.dumps({"step": step} | numbers).encode() + b"\n"


class MetricLog:
    """Appends to `log.jsonl` and `tensorboard` in `workdir`, in process 0; a context manager."""

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
                _encoded(last, values)
                for last, values in read_log(self._path)
                if last < step + (not any(name.startswith(again) for name in values))
            ]
            temporary = self._path.with_name("log.jsonl.tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self._path)
            start = SessionLog(status=SessionLog.START)  # hides later steps of earlier files
            self._events.write_event(Event(step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, which is on the disk then; what is not finite becomes `null` there."""
        if self._writes:
            numbers = {name: float(value) for name, value in values.items()}
            with self._path.open("ab") as file:
                file.write(_encoded(int(step), numbers))
                file.flush()
                os.fsync(file.fileno())
            self._show(step, *(summary.scalar(name, x) for name, x in numbers.items()))

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an RGB picture in TensorBoard."""
        if self._writes:
            self._show(step, summary.image(name, image, dataformats="HWC"))

    def _show(self, step: int, *contents: Any) -> None:
        for content in contents:
            self._events.write_event(Event(step=int(step), summary=content, wall_time=time.time()))
        self._events.flush()
