"""The published metrics: detection AP and recall, search mAP and top-k.

Search follows the released evaluations of CUHK-SYSU and PRW, which differ in the gallery only.
docs/evaluation.md has the rules, and what holds where the release leaves a case open or crashes.
A gallery may list an image several times (TestG100 does, with another box of the person): each
entry is searched for itself, the k-th entry of an image going with its k-th target.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Int

from alignps_jax.boxes import iou
from alignps_jax.evaluation.calibration import CENTERS, count
from alignps_jax.evaluation.ranking import GallerySearch
from alignps_jax.types import Annotations, GalleryDetections

# The metrics by their names in files and in the log, and as people write them.
DETECTION_METRICS = {"recall": "recall", "AP": "AP"}
SEARCH_METRICS = {"mAP": "mAP", "top1": "top-1", "top5": "top-5", "top10": "top-10"}
# Overlap from which a detection counts as a person of the ground truth (Paper, Sec. 4.1).
IOU_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """A curve of E steps: `precision[e]` holds for recalls from `edges[e]` to `edges[e + 1]`."""

    edges: Float[np.ndarray, "E_plus_1"]
    precision: Float[np.ndarray, "E"]

    @property
    def area(self) -> float:
        """Average precision (times recall): the mean of the precision over recalls 0 to 1."""
        return float(np.sum(np.diff(self.edges) * self.precision))


@dataclasses.dataclass(frozen=True)
class DetectionMetrics:
    """How many people were found and how well, from 0 to 1; `AP` is the area below the curve."""

    recall: float
    AP: float
    curve: PrecisionRecall


@dataclasses.dataclass(frozen=True)
class QueryOutcome:
    """What became of one query.

    `num_targets` gallery images hold the person; `precision` is that at each of them with a true
    positive, worst first; `first_hit` the rank of the first one, from 0, or infinite; `wrong_row`
    the most similar gallery detection that is none (the first of equals). `detected`: whether
    anything was in the query's photo.
    """

    num_targets: int
    detected: bool = False
    precision: Float[np.ndarray, "P"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    first_hit: float = math.inf
    wrong_row: int | None = None
    wrong_similarity: float = 0.0

    @property
    def ap(self) -> float:
        """Average precision, over all targets: a person that was not detected was not found."""
        return float(self.precision.sum()) / max(self.num_targets, 1)


@dataclasses.dataclass(frozen=True)
class SearchMetrics:
    """Search metrics from 0 to 1, and what became of each of the Q queries.

    `counts` are those of `calibration.fit`.
    """

    mAP: float  # noqa: N815 (its name everywhere)
    top1: float
    top5: float
    top10: float
    outcomes: tuple[QueryOutcome, ...]
    counts: Int[np.ndarray, "4 bins"]

    @property
    def per_query_ap(self) -> Float[np.ndarray, "Q"]:
        """The average precision of each query."""
        return np.array([one.ap for one in self.outcomes])

    @property
    def curve(self) -> PrecisionRecall:
        """Precision against recall, mean over the queries; the area below it is `mAP`."""
        return mean_curve((one.precision, one.num_targets) for one in self.outcomes)

    def hits(self, k: int) -> Bool[np.ndarray, "Q"]:
        """Which queries have a true positive among their first k detections."""
        return np.array([one.first_hit < k for one in self.outcomes], bool)

    def worst_first(self) -> Int[np.ndarray, "Q"]:
        """The queries, those without a hit at rank 0 first, lower AP first within each part."""
        return np.lexsort((self.per_query_ap, self.hits(1)))


def detection_metrics(
    annotations: Annotations,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    labeled_only: bool = False,
) -> DetectionMetrics:
    """Detection recall and AP as SeqNet's evaluation computes them, on the same images.

    AP is the average precision of the detections with a score of at least `score_threshold`, times
    recall; 0 without people or detections. `labeled_only` counts only people with an identity, and
    leaves out images that have none (but not the detections of unlabeled people in the others).
    """
    scores, found, num_people = [np.zeros(0, np.float32)], [np.zeros(0, bool)], 0
    for image, boxes in enumerate(annotations.boxes):
        boxes = boxes[annotations.labeled[image]] if labeled_only else boxes
        if labeled_only and len(boxes) == 0:
            continue
        rows = detections.of(image)
        kept = detections.scores[rows] >= float(score_threshold)
        scores.append(detections.scores[rows][kept])
        found.append(found_people(boxes, detections.boxes[rows][kept]))
        num_people += len(boxes)
    all_scores = np.concatenate(scores)
    precision = precision_at_hits(all_scores[np.concatenate(found)], all_scores)
    people, curve = max(num_people, 1), mean_curve([(precision, num_people)])
    return DetectionMetrics(precision.size / people, float(precision.sum()) / people, curve)


def search_metrics(search: GallerySearch) -> SearchMetrics:
    """Search mAP and top-1, -5, -10 of a protocol.

    In an image that holds the person, the most similar detection with IoU >= min(0.5,
    wh / ((w + 10)(h + 10))) is the true positive; w, h are those of the person's box. AP is the
    average precision times the share of images with a true positive.
    """
    # A query whose photo has no detections has nothing to search with: it stays a failure.
    outcomes = [QueryOutcome(len(images)) for images in search.protocol.target_images]
    counts = np.zeros((4, CENTERS.size), int)
    for query, ranking in search.rankings(range(len(outcomes))):
        hits, wrong = np.flatnonzero(ranking.is_match), np.flatnonzero(~ranking.is_match)[:1]
        found = ranking.similarity
        counts += np.stack([count(some) for some in (found, found[hits], found[:1], found[wrong])])
        outcomes[query] = QueryOutcome(
            num_targets=outcomes[query].num_targets,
            detected=True,
            precision=precision_at_hits(ranking.similarity[hits], ranking.similarity),
            first_hit=int(hits[0]) if hits.size else math.inf,
            wrong_row=int(ranking.row[wrong[0]]) if wrong.size else None,
            wrong_similarity=float(ranking.similarity[wrong].sum()),
        )
    return SearchMetrics(
        mAP=float(np.mean([one.ap for one in outcomes])),
        **{f"top{k}": float(np.mean([one.first_hit < k for one in outcomes])) for k in (1, 5, 10)},
        outcomes=tuple(outcomes),
        counts=counts,
    )


def found_people(
    people: Float[np.ndarray, "G 4"], boxes: Float[np.ndarray, "D 4"]
) -> Bool[np.ndarray, "D"]:
    """Which detections find somebody: each is the other's best (the first of equals)."""
    if len(people) == 0 or len(boxes) == 0:
        return np.zeros(len(boxes), bool)
    # The release compares IoUs that it stored as float32.
    overlap = np.asarray(iou(people[:, None].astype(float), boxes.astype(float)), np.float32)
    person, detection = overlap.argmax(axis=0), np.arange(len(boxes))
    mutual = overlap.argmax(axis=1)[person] == detection
    return mutual & (overlap[person, detection] >= IOU_THRESHOLD)


def precision_at_hits(
    hit_scores: Float[np.ndarray, "P"], scores: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "P"]:
    """Precision among everything that scores at least as much as each hit, worst hit first.

    Equal scores count together; the mean over the hits is scikit-learn's average precision.
    `scores` are those of all results, the hits among them, in any order.
    """
    if hit_scores.size == 0:
        return np.zeros(0)
    hits = np.sort(hit_scores)
    # Nothing below the worst hit has a say, and that is most of a gallery: it is not sorted.
    above = np.sort(scores[scores >= hits[0]])
    true = hits.size - np.searchsorted(hits, hits)
    return true / (above.size - np.searchsorted(above, hits))


def mean_curve(hits: Iterable[tuple[Float[np.ndarray, "_P"], int]]) -> PrecisionRecall:
    """The mean of the curves of several queries.

    Of each, `hits` has `precision_at_hits` and the number n of what could have been found. The k-th
    best hit stands for the recalls from (k - 1) / n to k / n; beyond the last one precision is 0.
    """
    steps = [(np.arange(len(found) + 1) / max(n, 1), found[::-1]) for found, n in hits]
    edges = np.unique(np.concatenate([[0.0, 1.0], *(edges for edges, _ in steps)]))
    # What every query adds to the sum where one of its steps begins, and takes off where it ends.
    change = np.zeros(len(edges))
    for own, precision in steps:
        places = np.searchsorted(edges, own)
        np.add.at(change, places[:-1], precision)
        np.add.at(change, places[1:], -precision)
    return PrecisionRecall(edges, np.cumsum(change)[:-1] / max(len(steps), 1))
