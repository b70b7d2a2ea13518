"""Precision-recall curves whose areas are the published figures.

The rules are those of `metrics.py`: the area below the detection curve is its AP, the one below the
search curve of a protocol its mAP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from alignps_jax.evaluation.cbgm import ContextMatching
from alignps_jax.evaluation.detections_io import align_detections
from alignps_jax.evaluation.metrics import found_people
from alignps_jax.evaluation.ranking import GallerySearch
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """A curve of E steps: `precision[e]` holds for recalls from `edges[e]` to `edges[e + 1]`."""

    edges: Float[np.ndarray, "E+1"]
    precision: Float[np.ndarray, "E"]

    @property
    def area(self) -> float:
        """Average precision (times recall): the mean of the precision over recalls 0 to 1."""
        return float(np.sum(np.diff(self.edges) * self.precision))


def detection_curve(
    annotations: Annotations,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> PrecisionRecall:
    """Precision of the people detected, against recall; arguments as in `detection_metrics`.

    Raises:
      UserError: an image of `annotations` is missing from `detections`.
    """
    aligned = align_detections(detections, annotations.names, "detections")
    scores, found = [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    for image, people in enumerate(annotations.boxes):
        rows = aligned.of(image)
        kept = aligned.scores[rows] >= float(score_threshold)
        scores.append(aligned.scores[rows][kept])
        found.append(found_people(people, aligned.boxes[rows][kept], iou_threshold))
    all_scores = np.concatenate(scores)
    hits = precision_at_hits(all_scores[np.concatenate(found)], all_scores)
    return mean_curve([(hits, sum(map(len, annotations.boxes)))])


def search_curve(
    protocol: SearchProtocol,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    context: ContextMatching | None = None,
) -> PrecisionRecall:
    """Precision of the gallery's ranking against recall, mean over all queries.

    A query's precision at a recall is that of the ranking down to where the recall is reached, 0
    if it never is. Arguments and errors as in `search_metrics`.
    """
    search = GallerySearch.prepare(protocol, detections, score_threshold, context)
    rows = [search.query_row(query) for query in range(len(protocol.query_image))]
    asked = np.array([query for query, row in enumerate(rows) if row is not None], np.int64)
    hits: list[tuple[np.ndarray, int]] = [(np.zeros(0), 1)] * (len(rows) - len(asked))
    asked_rows = np.array([rows[query] for query in asked], np.int64)
    for _, gallery, similarity in search.similarities(asked, asked_rows):
        matches = search.true_positives(gallery, similarity)
        precision = precision_at_hits(similarity[matches], similarity)
        hits.append((precision, len(gallery.target_positions)))
    return mean_curve(hits)


def precision_at_hits(
    hit_scores: Float[np.ndarray, "P"], scores: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "P"]:
    """Precision among everything that scores at least as much as each hit, best hit first."""
    hits, everything = np.sort(hit_scores), np.sort(scores)
    true = len(hits) - np.searchsorted(hits, hits)
    return (true / np.maximum(len(everything) - np.searchsorted(everything, hits), 1))[::-1]


def mean_curve(hits: Iterable[tuple[Float[np.ndarray, "P"], int]]) -> PrecisionRecall:
    """The mean of the curves of several queries.

    Args:
      hits: per query its precisions, best hit first, and how many could have been found; the k-th
        hit of n stands for the recalls from (k - 1) / n to k / n.
    """
    steps = [
        (np.arange(len(precision) + 1) / max(total, 1), precision) for precision, total in hits
    ]
    edges = np.unique(np.concatenate([[0.0, 1.0], *(edges for edges, _ in steps)]))
    # What every query adds to the sum where one of its steps begins, and takes off where it ends.
    change = np.zeros(len(edges))
    for own, precision in steps:
        places = np.searchsorted(edges, own)
        np.add.at(change, places[:-1], precision)
        np.add.at(change, places[1:], -precision)
    return PrecisionRecall(edges, np.cumsum(change)[:-1] / max(len(steps), 1))
