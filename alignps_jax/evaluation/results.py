"""What an evaluation found, as a table, by the names in `metrics.json`, and query by query."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignps_jax.evaluation.metrics import (
    DETECTION_METRICS,
    SEARCH_METRICS,
    DetectionMetrics,
    QueryOutcome,
    SearchMetrics,
)
from alignps_jax.files import complete_file
from alignps_jax.types import GalleryDetections, SearchProtocol

# Wider than any table, so that no line is ever broken, on a terminal or in a file.
_WIDTH = 200


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one network reaches on one data set, and the detections that this was computed from."""

    step: int | None  # of the checkpoint in training; None: the detections are from a file
    detections: GalleryDetections
    detection: DetectionMetrics  # of everybody
    labeled_detection: DetectionMetrics  # of people with an identity
    searches: Mapping[str, SearchMetrics]  # by the names of the protocols
    chosen_by: str | None = None  # what chose the step among those of its run
    folder: Path | None = None  # of the checkpoint

    @property
    def score(self) -> float:
        """The score of a checkpoint: mAP of the first protocol."""
        return next(iter(self.searches.values())).mAP

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """All metrics by their names in `metrics.json`, as fractions."""
        return {
            "detection": _values(self.detection, DETECTION_METRICS),
            "detection_labeled": _values(self.labeled_detection, DETECTION_METRICS),
            "search": {n: _values(one, SEARCH_METRICS) for n, one in self.searches.items()},
        }


def _values(found: DetectionMetrics | SearchMetrics, names: Iterable[str]) -> dict[str, float]:
    return {name: float(getattr(found, name)) for name in names}


def print_results(conditions: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table to stdout, one line per system and search protocol, in percent.

    `conditions` are its title, `metrics` those of each system (`Measured.metrics`). Plain text when
    stdout is not a terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("system")
    for people in ("people", "with id"):
        for above, metric in zip((people, ""), DETECTION_METRICS.values(), strict=True):
            table.add_column(f"{above}\n{metric}", justify="right")
    table.add_column("search\nprotocol")
    for metric in SEARCH_METRICS.values():
        table.add_column(f"\n{metric}", justify="right")
    for system, found in metrics.items():
        cells = [*found["detection"].values(), *found["detection_labeled"].values()]
        lead = [system, *(f"{100 * value:.1f}" for value in cells)]
        for name, search in found["search"].items():
            table.add_row(*lead, name, *(f"{100 * value:.1f}" for value in search.values()))
            lead = [""] * len(lead)  # it holds for all protocols
    # Made at each call: the present stdout decides on colors, and on line or ASCII drawing.
    console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(f"\n{conditions}; metrics in percent\n", soft_wrap=True)
    console.print(table)


QUERY_COLUMNS = (
    "protocol,query,image,x1,y1,x2,y2,detected,AP,first_hit,targets,matches,"
    "wrong_image,wrong_x1,wrong_y1,wrong_x2,wrong_y2,wrong_similarity\n"
)


def write_queries_csv(path: Path, protocols: Iterable[SearchProtocol], measured: Measured) -> None:
    """Writes what became of every query, by protocol, the failures first.

    `query` is the number in the protocol, from 0; `detected` says whether anything was detected in
    its photo, `first_hit` is the rank of the first right result, from 1 (empty: none). `matches`
    of the `targets` images that hold the person have a right result. `wrong_...` is the most
    similar wrong result (empty: there is none). Boxes are in the photo's pixels.
    """
    detections = measured.detections
    with complete_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(QUERY_COLUMNS)
        writer = csv.writer(file, lineterminator="\n")
        for protocol in protocols:
            search = measured.searches[protocol.name]
            for query in search.worst_first().tolist():
                name = detections.names[int(protocol.query_image[query])]
                asked = protocol.name, query, name, *_rounded(protocol.query_box[query])
                writer.writerow((*asked, *_cells(search.outcomes[query], detections)))


def _cells(outcome: QueryOutcome, detections: GalleryDetections) -> tuple[object, ...]:
    rank = "" if math.isinf(outcome.first_hit) else outcome.first_hit + 1
    counts = outcome.num_targets, outcome.precision.size
    cells = ("yes" if outcome.detected else "no", round(outcome.ap, 6), rank, *counts)
    row = outcome.wrong_row
    if row is None:
        return (*cells, *[""] * 6)
    name, box = detections.names[detections.image_of(row)], _rounded(detections.boxes[row])
    return (*cells, name, *box, round(outcome.wrong_similarity, 6))


def _rounded(box: Iterable[float]) -> list[float]:
    return [round(float(value), 2) for value in box]
