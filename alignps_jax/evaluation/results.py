"""What an evaluation reports: the table, `metrics.json` and `queries.csv`.

A reader of a file sees the old one or the new one, never half of one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from alignps_jax.evaluation.cbgm import ContextMatching
from alignps_jax.evaluation.metrics import (
    DETECTION_METRICS,
    SEARCH_METRICS,
    DetectionMetrics,
    SearchMetrics,
)
from alignps_jax.files import write_atomically, write_json
from alignps_jax.types import GalleryDetections, SearchProtocol

# Overlap from which a detection counts as a person of the ground truth (Paper, Sec. 4.1).
IOU_THRESHOLD = 0.5
# Wider than any table, so that no line is ever broken, on a terminal or in a file.
_WIDTH = 200


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What one network reaches on one data set.

    `step` is the training step of its checkpoint (None: detections from a file),
    `score_threshold` the score below which detections were left out, `boxes` where boxes came
    from, `context` the context matching, `labeled_detection` the finding of people with an
    identity only, `searches` maps a protocol's name to its result.
    """

    dataset: str
    step: int | None
    score_threshold: float
    boxes: str
    context: ContextMatching | None
    detection: DetectionMetrics
    labeled_detection: DetectionMetrics
    searches: Mapping[str, SearchMetrics]
    # What chose the step among those of its run; None: nothing was chosen.
    chosen_by: str | None = None

    @property
    def conditions(self) -> str:
        """One line on how this was measured."""
        parts = [self.dataset]
        if self.step is not None:
            by = f" (chosen by {self.chosen_by})" if self.chosen_by else ""
            parts.append(f"checkpoint step {self.step}{by}")
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


def print_results(rows: Sequence[ResultRow]) -> None:
    """Prints a table to stdout, one line per system and search protocol, in percent.

    All rows (one at least) were measured under the conditions that the title names, but for the
    checkpoint step, which is the first row's. Plain text, at most 80 columns wide for protocol
    names of up to 12 letters, when stdout is not a terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("system")
    for people in ("people", "with id"):
        for above, metric in zip((people, ""), DETECTION_METRICS.values(), strict=True):
            table.add_column(f"{above}\n{metric}", justify="right")
    table.add_column("search\nprotocol")
    for metric in SEARCH_METRICS.values():
        table.add_column(f"\n{metric}", justify="right")
    for row in rows:
        for cells in _table_lines(row):
            table.add_row(*cells)
    # Made at each call: the present stdout decides on colors, and on line or ASCII drawing.
    console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(f"\n{rows[0].result.conditions}; metrics in percent\n", soft_wrap=True)
    console.print(table)


def _table_lines(row: ResultRow) -> Iterable[tuple[str, ...]]:
    """The cells of one system; what holds for all its protocols stands in the first line only."""
    result = row.result
    found = (result.detection, result.labeled_detection)
    detection = [_percent(x) for one in found for x in detection_values(one).values()]
    lead = (row.system, *detection)
    if not result.searches:
        yield lead
    for name, search in result.searches.items():
        yield (*lead, name, *map(_percent, search_values(search).values()))
        lead = ("",) * len(lead)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def fraction(value: object) -> float:
    """A metric as `metrics.json` has it; ValueError for what is no number from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"found {str(value)[:60]}, expected a number from 0 to 1")
    return float(value)  # type: ignore[arg-type]


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
        "checkpoint_chosen_by": result.chosen_by,
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
        "detection": detection_values(result.detection),
        "detection_labelled": detection_values(result.labeled_detection),
        "search": {name: search_values(search) for name, search in result.searches.items()},
    }


def detection_values(found: DetectionMetrics) -> dict[str, float]:
    """The metrics of `DETECTION_METRICS` by name, as fractions."""
    return {name: float(getattr(found, name)) for name in DETECTION_METRICS}


def search_values(found: SearchMetrics) -> dict[str, float]:
    """The metrics of `SEARCH_METRICS` by name, as fractions."""
    return {name: float(getattr(found, name)) for name in SEARCH_METRICS}


QUERY_COLUMNS = (
    *("protocol", "query", "image", "x1", "y1", "x2", "y2", "detected", "AP", "first_hit"),
    *("targets", "matches", "wrong_image", "wrong_x1", "wrong_y1", "wrong_x2", "wrong_y2"),
    "wrong_similarity",
)


def write_queries_csv(
    path: Path,
    protocols: Sequence[SearchProtocol],
    searches: Mapping[str, SearchMetrics],
    detections: GalleryDetections,
) -> None:
    """Writes what became of every query, by protocol, the failures first.

    `query` is the number in the protocol, from 0; `detected` says whether anything was detected in
    its photo, `first_hit` is the rank of the first right result, from 1 (empty: none). `matches`
    of the `targets` images that hold the person have a right result. `wrong_...` is the most
    similar wrong result (empty: there is none). Boxes are in the photo's pixels.

    Args:
      path: the file.
      protocols: what was searched.
      searches: the metrics of each, by name.
      detections: what the metrics were computed from.

    Raises:
      UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(QUERY_COLUMNS)
    for protocol in protocols:
        search = searches[protocol.name]
        for query in search.worst_first().tolist():
            writer.writerow(_query_cells(protocol, search, detections, query))
    write_atomically(path, text.getvalue().encode())


def _query_cells(
    protocol: SearchProtocol, search: SearchMetrics, detections: GalleryDetections, query: int
) -> tuple[object, ...]:
    wrong: tuple[object, ...] = ("",) * 6
    if search.mistakable[query]:
        row = int(search.wrong_row[query])
        image = int(np.searchsorted(detections.offsets, row, side="right")) - 1
        similarity = round(float(search.wrong_similarity[query]), 6)
        wrong = (detections.names[image], *_rounded(detections.boxes[row]), similarity)
    return (
        protocol.name,
        query,
        detections.names[int(protocol.query_image[query])],
        *_rounded(protocol.query_box[query]),
        "yes" if search.detected[query] else "no",
        round(float(search.per_query_ap[query]), 6),
        int(search.first_hit[query]) + 1 if search.found[query] else "",
        int(search.num_targets[query]),
        int(search.num_matches[query]),
        *wrong,
    )


def _rounded(box: Float[np.ndarray, "4"]) -> list[float]:
    return [round(float(value), 2) for value in box]
