"""Result tables, JSON results, and the log of measurements.

Files are written atomically: a reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float, UInt8
from rich import box
from rich.console import Console
from rich.table import Table
from tensorboardX import SummaryWriter

from alignps_jax.cbgm import ContextMatching
from alignps_jax.metrics import DetectionMetrics, SearchMetrics
from alignps_jax.types import UserError

# Overlap from which a detection counts as a person of the ground truth (Sec. 4.1 of the paper).
IOU_THRESHOLD = 0.5
# More than a table takes, so that no line of it is ever broken, whatever stdout is.
_WIDTH = 200


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What one network reaches on one data set.

    `step` is the training step of its checkpoint (None: detections from a file),
    `score_threshold` the score below which detections were left out, `boxes` where boxes came
    from, `context` the context matching, `labelled_detection` the finding of people with an
    identity only, `searches` maps a protocol's name to its result.
    """

    dataset: str
    step: int | None
    score_threshold: float
    boxes: str
    context: ContextMatching | None
    detection: DetectionMetrics
    labelled_detection: DetectionMetrics
    searches: Mapping[str, SearchMetrics]

    @property
    def conditions(self) -> str:
        """One line on how this was measured."""
        parts = [self.dataset]
        if self.step is not None:
            parts.append(f"checkpoint step {self.step}")
        if self.boxes != "detected":
            parts.append(f"{self.boxes.replace('_', ' ')} boxes")
        if self.context is not None:
            parts.append(f"context matching {self.context.images}, {self.context.people}")
        return ", ".join([*parts, f"scores >= {self.score_threshold:g}"])


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One system of the result table, for example "trained" or "untrained"."""

    system: str
    result: EvaluationResult


@dataclasses.dataclass(frozen=True)
class FoundPerson:
    """One result of a search in photos: box in the photo's pixels, cosine similarity, score."""

    image: str
    box: Float[np.ndarray, "4"]
    similarity: float
    score: float


@dataclasses.dataclass(frozen=True)
class QueryRanking:
    """The people found for one query box, most similar first."""

    image: str
    box: Float[np.ndarray, "4"]
    results: tuple[FoundPerson, ...]


@dataclasses.dataclass(frozen=True)
class LogLine:
    """The measurements of one line of the log; NaN stands for one that was not finite."""

    step: int
    values: Mapping[str, float]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file as a whole, making its folder where needed.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def print_results(rows: Sequence[ResultRow]) -> None:
    """Prints a table to stdout, one line per system and search protocol, in percent.

    All rows (one at least) were measured under the conditions that the title names, but for the
    checkpoint step, which is the first row's. Plain text, at most 80 columns wide for protocol
    names of up to 12 letters, when stdout is not a terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("system")
    table.add_column("people\nrecall", justify="right")
    table.add_column("\nAP", justify="right")
    table.add_column("with id\nrecall", justify="right")
    table.add_column("\nAP", justify="right")
    table.add_column("search\nprotocol")
    for name in ("mAP", "top-1", "top-5", "top-10"):
        table.add_column(f"\n{name}", justify="right")
    for row in rows:
        for cells in _table_lines(row):
            table.add_row(*cells)
    # Made at each call: the stdout of now decides on colours, and on line or ASCII drawing.
    console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(f"\n{rows[0].result.conditions}; figures in percent\n", soft_wrap=True)
    console.print(table)


def _table_lines(row: ResultRow) -> Iterable[tuple[str, ...]]:
    """The cells of one system; what holds for all its protocols stands in the first line only."""
    found, labelled = row.result.detection, row.result.labelled_detection
    lead = (row.system, *map(_percent, (found.recall, found.AP, labelled.recall, labelled.AP)))
    if not row.result.searches:
        yield lead
    for name, search in row.result.searches.items():
        values = (search.mAP, search.top1, search.top5, search.top10)
        yield (*lead, name, *map(_percent, values))
        lead = ("",) * len(lead)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def write_metrics_json(
    path: Path, result: EvaluationResult, untrained: EvaluationResult | None = None
) -> None:
    """Writes the metrics as fractions, with what they were measured on.

    `untrained` is the same evaluation of a network that learned nothing; it becomes the entry
    "untrained", with its own "detection" and "search".

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "dataset": result.dataset,
        "checkpoint_step": None if result.step is None else int(result.step),
        "score_threshold": float(result.score_threshold),
        "boxes": result.boxes,
        "context_matching": list(dataclasses.astuple(result.context)) if result.context else [],
        "iou_threshold": IOU_THRESHOLD,
        **_metrics(result),
    }
    if untrained is not None:
        content["untrained"] = _metrics(untrained)
    write_json(path, content)


def _metrics(result: EvaluationResult) -> dict[str, dict]:
    return {
        "detection": _detection(result.detection),
        "detection_labelled": _detection(result.labelled_detection),
        "search": {
            name: {key: float(getattr(search, key)) for key in ("mAP", "top1", "top5", "top10")}
            for name, search in result.searches.items()
        },
    }


def _detection(found: DetectionMetrics) -> dict[str, float]:
    return {"recall": float(found.recall), "AP": float(found.AP)}


def write_ranking_json(path: Path, rankings: Sequence[QueryRanking]) -> None:
    """Writes what `--mode=search` found: per query box a list of people, most similar first.

    Boxes are `[x1, y1, x2, y2]` in pixels of the photo as a viewer shows it (EXIF applied).

    Raises:
        UserError: the file cannot be written.
    """
    content = [
        {
            "query": {"image": ranking.image, "box": _box(ranking.box)},
            "results": [
                {
                    "image": found.image,
                    "box": _box(found.box),
                    "similarity": round(float(found.similarity), 6),
                    "score": round(float(found.score), 6),
                }
                for found in ranking.results
            ],
        }
        for ranking in rankings
    ]
    write_json(path, content)


def _box(values: Float[np.ndarray, "4"]) -> list[float]:
    return [round(float(value), 2) for value in values]


def write_json(path: Path, content: object) -> None:
    """Writes `content`, indented, as a whole; UserError if the file cannot be written."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


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
            whole = self._path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(whole)
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
        """Removes what was measured after `step`, for training that goes on from there.

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
