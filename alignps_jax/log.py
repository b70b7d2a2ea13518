"""The log of a run: one line of JSON per step that is logged, and TensorBoard beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from alignps_jax.files import write_atomically, writing
from alignps_jax.types import UserError

_FLUSH_SECONDS = 10.0
_MAX_STEP = 2**31  # of which the training step counts


@dataclasses.dataclass(frozen=True)
class LogLine:
    """The measurements of one line of the log; NaN stands for one that was not finite."""

    step: int
    values: Mapping[str, float]


def read_log(path: Path) -> tuple[LogLine, ...]:
    """Reads a log that `MetricLog` wrote.

    A last line that was cut off is left out in silence, since every kill can leave one; a damaged
    line is left out with a note on stdout.

    Raises:
        UserError: the file cannot be read, or none of its lines is one of a log.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    lines = data.split(b"\n")[:-1]
    parsed = [_parse_line(line) for line in lines]
    damaged = [number for number, line in enumerate(parsed, start=1) if line is None]
    if damaged:
        number = damaged[0]
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        found = (
            f"{path}, line {number}{more}: found {lines[number - 1][:60]!r}, expected "
            '{"step": ..., "<name>": ...}'
        )
        if len(damaged) == len(lines):
            raise UserError(found)
        print(f"note: {found}; left out")
    return tuple(line for line in parsed if line is not None)


def _parse_line(line: bytes) -> LogLine | None:
    """None for what is no line of a log."""
    try:
        content = json.loads(line)
        step = content.pop("step")
        values = {name: _measurement(value) for name, value in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    return LogLine(step, values) if type(step) is int and 0 <= step < _MAX_STEP else None


def _measurement(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or math.isinf(value):
        raise ValueError(f"{value!r} is no measurement")
    return float(value)


class MetricLog:
    """Appends measurements to `<workdir>/log.jsonl` and to TensorBoard files beside it.

    Every line is with the system when `scalars` returns, so a killed process loses none; a line
    that it was just writing is dropped when the log is opened again. A context manager.

    All methods raise UserError, with the file's name, where it cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / "log.jsonl"
        self._tensorboard = TensorBoard(workdir / "tensorboard")
        with writing(self._path):
            workdir.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written is not tried once more when the file is closed.
            self._file = self._path.open("ab", buffering=0)
            complete = self._path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(complete)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        # After an error, the same full disk may say the same again.
        with contextlib.suppress(*([UserError] if error else [])):
            self._tensorboard.close()

    def flush(self) -> None:
        """Writes out what TensorBoard still holds."""
        self._tensorboard.flush()

    def sync(self) -> None:
        """Sees that what was measured is on the disk itself, as what is saved next will be."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int, *, again: str = "") -> None:
        """Removes what was measured after `step`, for training that resumes there.

        Of the lines of `step` itself, those go whose names begin with `again`: what they say is
        measured once more. Damaged lines go, with a note.
        """
        self._file.close()
        lines = self._path.read_bytes().split(b"\n")[:-1]
        parsed = [_parse_line(line) for line in lines]
        damaged = [number for number, line in enumerate(parsed, start=1) if line is None]
        if damaged:
            numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            print(f"note: {self._path}: removed what is no line of a log (line {numbers})")

        def stays(line: LogLine) -> bool:
            repeated = again and any(name.startswith(again) for name in line.values)
            return line.step < step or (line.step == step and not repeated)

        kept = [
            line
            for line, content in zip(lines, parsed, strict=True)
            if content is not None and stays(content)
        ]
        write_atomically(self._path, b"".join(line + b"\n" for line in kept))
        with writing(self._path):
            self._file = self._path.open("ab", buffering=0)
        self._tensorboard.purge_after(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become `null` there."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": int(step)} | {
            name: value if math.isfinite(value) else None for name, value in numbers.items()
        }
        rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        with writing(self._path):
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        for name, value in numbers.items():
            self._tensorboard.add(step, summary.scalar(name, value))

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an RGB picture in TensorBoard."""
        self._tensorboard.add(step, summary.image(name, image, dataformats="HWC"))


class TensorBoard:
    """Event files for TensorBoard, written by the thread that measures.

    tensorboardX's own writer has a thread for that, whose errors reach nobody: when the disk is
    full, training would wait for it forever.

    All methods raise UserError where a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: RecordWriter | None = None
        self._purge_step: int | None = None
        self._flushed = time.monotonic()

    def add(self, step: int, content: Any) -> None:
        """Adds a `Summary` of tensorboardX."""
        if self._file is None:
            self._open()
        self._write(Event(step=int(step), summary=content))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def purge_after(self, step: int) -> None:
        """Hides what earlier files have of later steps, and begins a new file."""
        self.close()
        self._purge_step = step + 1

    def flush(self) -> None:
        """Writes out what is in memory."""
        if self._file is not None:
            with writing(self._folder):
                self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes out what is in memory, and closes the file."""
        file, self._file = self._file, None
        if file is not None:
            with writing(self._folder):
                file.close()

    def _open(self) -> None:
        # Named by the nanosecond: two of one moment would empty each other.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._folder / name))
        self._write(Event(file_version="brain.Event:2"))
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=self._purge_step, session_log=start))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        assert self._file is not None
        with writing(self._folder):
            self._file.write(event.SerializeToString())
