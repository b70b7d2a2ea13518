"""What became of each query, as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from alignps_jax.metrics import SearchMetrics
from alignps_jax.report import write_atomically
from alignps_jax.types import GalleryDetections, SearchProtocol

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
      searches: the figures of each, by name.
      detections: what the figures were computed from.

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
    wrong = ("",) * 6
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
