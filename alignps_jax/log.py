"""The log of a run: one line of JSON per step that is logged, and TensorBoard beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from alignps_jax.files import write_atomically
from alignps_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LogLine:
    """The measurements of one line of the log; NaN stands for one that was not finite."""

    step: int
    values: Mapping[str, float]


def read_log(path: Path) -> tuple[LogLine, ...]:
    """Reads a log that `MetricLog` wrote; a last line that was cut off is left out.

    Raises:
        UserError: the file cannot be read, or a line is not one of a log.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    lines = data.split(b"\n")[:-1]
    return tuple(_parse_line(path, number, line) for number, line in enumerate(lines, start=1))


def _parse_line(path: Path, number: int, line: bytes) -> LogLine:
    try:
        content = json.loads(line)
        step = content.pop("step")
        values = {
            name: math.nan if value is None else float(value) for name, value in content.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError):
        step, values = None, {}
    if not isinstance(step, int):
        raise UserError(
            f'{path}, line {number}: found {line[:60]!r}, expected {{"step": ..., "<name>": ...}}'
        )
    return LogLine(step, values)


class MetricLog:
    """Appends measurements to `<workdir>/log.jsonl` and to TensorBoard files beside it.

    Every line is on disk when `scalars` returns, so a killed process loses none; a line that it
    was just writing is dropped when the log is opened again. A context manager.

    Raises:
        UserError: the working folder cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / "log.jsonl"
        self._tensorboard_dir = workdir / "tensorboard"
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            complete = self._path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(complete)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes out what TensorBoard still holds and closes the files."""
        self._file.close()
        self._close_tensorboard()

    def truncate_after(self, step: int) -> None:
        """Removes what was measured after `step`, for training that resumes there.

        Raises:
            UserError: the log holds a line that is not one of a log.
        """
        # Lines without their ends, which is how `read_log` counts them.
        lines = self._path.read_bytes().split(b"\n")[:-1]
        kept = [
            line
            for line, parsed in zip(lines, read_log(self._path), strict=True)
            if parsed.step <= step
        ]
        self._file.close()
        write_atomically(self._path, b"".join(line + b"\n" for line in kept))
        self._file = self._path.open("ab")
        self._close_tensorboard()
        self._purge_step = step + 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become `null` there."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": int(step)} | {
            name: value if math.isfinite(value) else None for name, value in numbers.items()
        }
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        writer = self._writer()
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Shows an RGB picture in TensorBoard."""
        self._writer().add_image(name, image, step, dataformats="HWC")

    def _writer(self) -> SummaryWriter:
        """The TensorBoard writer; events from `purge_step` on of earlier runs are hidden."""
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(
                str(self._tensorboard_dir),
                purge_step=self._purge_step,
                flush_secs=10,
                # Files are named by the second; two of one second would empty each other.
                filename_suffix=f".{time.time_ns()}",
            )
        return self._tensorboard

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
