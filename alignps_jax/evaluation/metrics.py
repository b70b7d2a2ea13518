"""The published metrics: detection AP and recall, search mAP and top-k.

Search follows the released evaluations of CUHK-SYSU and PRW, which differ in the gallery only, and
the protocol says what that is. Where the release leaves a case open or crashes:

- A query photo without detections has no embedding: AP 0, never a hit.
- A query without a true positive (missed, or nobody to be found): AP 0, never a hit.
- A gallery image without detections above the threshold adds nothing to the ranking, but still
  counts among the images that hold the person.
- A gallery may list an image several times (TestG100 does, with another box of the person):
  each entry is searched for itself, the k-th entry of an image going with its k-th target.
- Equal similarities: AP treats them as one step, as scikit-learn does. Which of them comes first
  in a ranking is up to `argsort()[::-1]` of float32 values in the published order; that sort is
  not stable, so the same call is made here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from alignps_jax.boxes import iou
from alignps_jax.evaluation import cbgm
from alignps_jax.evaluation.detections_io import align_detections
from alignps_jax.evaluation.precision_recall import PrecisionRecall, mean_curve, precision_at_hits
from alignps_jax.evaluation.ranking import (
    BLOCKS,
    Blocks,
    Gallery,
    GallerySearch,
    exact,
    published_order,
)
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol, UserError

# The metrics by their names in files and in the log, and as people write them.
DETECTION_METRICS = {"recall": "recall", "AP": "AP"}
SEARCH_METRICS = {"mAP": "mAP", "top1": "top-1", "top5": "top-5", "top10": "top-10"}


@dataclasses.dataclass(frozen=True)
class DetectionMetrics:
    """How many people were found (`recall`) and how well (`AP`), both from 0 to 1.

    `precision` is that at each of the P people found, worst first (`precision_at_hits`).
    """

    recall: float
    AP: float
    num_people: int
    num_detections: int
    precision: Float[np.ndarray, "P"]

    @property
    def curve(self) -> PrecisionRecall:
        """Precision against recall; the area below it is `AP`."""
        return mean_curve([(self.precision, self.num_people)])


@dataclasses.dataclass(frozen=True)
class SearchMetrics:
    """Search metrics from 0 to 1, and what became of each of the Q queries.

    `first_hit[q]` is the rank, from 0, of the first true positive, meaningful where `found[q]`.
    `query_row[q]` is the detection that gave the query's embedding, meaningful where
    `detected[q]`. `num_matches[q]` of the `num_targets[q]` gallery images that hold the person
    have a true positive, and `precision[q]` is that at each of them, worst first. `wrong_row[q]`
    is the most similar gallery detection that is none (the first of equals) and
    `wrong_similarity[q]` its similarity, meaningful where `mistakable[q]`.
    """

    mAP: float  # noqa: N815 (its name everywhere)
    top1: float
    top5: float
    top10: float
    per_query_ap: Float[np.ndarray, "Q"]
    first_hit: Int[np.ndarray, "Q"]
    found: Bool[np.ndarray, "Q"]
    num_targets: Int[np.ndarray, "Q"]
    num_matches: Int[np.ndarray, "Q"]
    query_row: Int[np.ndarray, "Q"]
    detected: Bool[np.ndarray, "Q"]
    wrong_row: Int[np.ndarray, "Q"]
    wrong_similarity: Float[np.ndarray, "Q"]
    mistakable: Bool[np.ndarray, "Q"]
    precision: tuple[Float[np.ndarray, "_P"], ...]

    @property
    def curve(self) -> PrecisionRecall:
        """Precision against recall, mean over the queries; the area below it is `mAP`.

        A query's precision at a recall is that of the ranking down to where the recall is reached,
        0 if it never is.
        """
        return mean_curve(zip(self.precision, self.num_targets.tolist(), strict=True))

    def hits(self, k: int) -> Bool[np.ndarray, "Q"]:
        """Which queries have a true positive among their first k detections."""
        return self.found & (self.first_hit < k)

    def worst_first(self) -> Int[np.ndarray, "Q"]:
        """The queries, those without a hit at rank 0 first, lower AP first within each part."""
        return np.lexsort((self.per_query_ap, self.hits(1)))


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The gallery detections of one query, most similar first.

    `row` are rows of the `GalleryDetections`, `image` indices of its images; `query_row` is the
    row whose embedding was searched, None if the query photo has no detections (the ranking is
    empty then).
    """

    query_row: int | None
    row: Int[np.ndarray, "R"]
    image: Int[np.ndarray, "R"]
    boxes: Float[np.ndarray, "R 4"]
    similarity: Float[np.ndarray, "R"]
    is_match: Bool[np.ndarray, "R"]


def detection_metrics(
    annotations: Annotations,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
    labeled_only: bool = False,
) -> DetectionMetrics:
    """Detection recall and AP as SeqNet's evaluation computes them.

    A detection finds a person if their IoU reaches `iou_threshold` and each is the other's best
    (the first of equals). AP is the average precision of the detections with a score of at least
    `score_threshold`, times recall; 0 without people or detections. `labeled_only` counts only
    people with an identity, and leaves out images that have none (but not the detections of
    unlabeled people in the others).

    Raises:
      UserError: an image of `annotations` is missing from `detections`.
    """
    aligned = align_detections(detections, annotations.names, "detections")
    scores, found, num_people = [np.zeros(0, np.float32)], [np.zeros(0, bool)], 0
    for image, boxes in enumerate(annotations.boxes):
        if labeled_only:
            boxes = boxes[annotations.labeled[image]]
            if len(boxes) == 0:
                continue
        rows = aligned.of(image)
        kept = aligned.scores[rows] >= float(score_threshold)
        scores.append(aligned.scores[rows][kept])
        found.append(found_people(boxes, aligned.boxes[rows][kept], iou_threshold))
        num_people += len(boxes)
    all_scores = np.concatenate(scores)
    precision = precision_at_hits(all_scores[np.concatenate(found)], all_scores)
    people = max(num_people, 1)
    return DetectionMetrics(
        recall=precision.size / people,
        AP=float(precision.sum()) / people,
        num_people=num_people,
        num_detections=all_scores.size,
        precision=precision,
    )


def search_metrics(
    protocol: SearchProtocol,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    context: cbgm.ContextMatching | None = None,
    blocks: Blocks = BLOCKS,
) -> SearchMetrics:
    """Search mAP and top-1, -5, -10 of `protocol`, whose image indices are those of `detections`.

    The query's embedding is that of the detection that overlaps the query box most, whatever its
    score. Gallery detections with a score of at least `score_threshold` are ranked by cosine. In
    an image that holds the person, the most similar detection with IoU >= min(0.5,
    wh / ((w + 10)(h + 10))) is the true positive; w, h are those of the person's box. AP is the
    average precision times the share of images with a true positive. `context` adds SeqNet's
    bipartite matching. `blocks` decides on speed only.

    Raises:
      UserError: a protocol without queries, with image indices that `detections` does not have, or
        with target images that are not in the gallery.
    """
    search = GallerySearch.prepare(protocol, detections, score_threshold, context, blocks)
    rows = [search.query_row(query) for query in range(len(protocol.query_image))]
    # A query whose photo has no detections has nothing to search with: it stays a failure.
    outcomes = [_Outcome() for _ in rows]
    asked = np.array([query for query, row in enumerate(rows) if row is not None], np.int64)
    asked_rows = np.array([rows[query] for query in asked], np.int64)
    for query, gallery, similarity in search.similarities(asked, asked_rows):
        outcomes[query] = _outcome(search, gallery, similarity)
    num_targets = np.array([len(images) for images in protocol.target_images])
    # Over all targets, not over the true positives: a person that was not detected in an image of
    # the gallery could not be found there.
    ap = np.array([one.precision.sum() for one in outcomes]) / np.maximum(num_targets, 1)
    found = np.array([one.precision.size > 0 for one in outcomes])
    first_hit = np.array([one.first_hit for one in outcomes], np.int64)
    top = {f"top{k}": float(np.mean(found & (first_hit < k))) for k in (1, 5, 10)}
    return SearchMetrics(
        mAP=float(ap.mean()),
        **top,
        per_query_ap=ap,
        first_hit=first_hit,
        found=found,
        num_targets=num_targets,
        num_matches=np.array([one.precision.size for one in outcomes], np.int64),
        query_row=np.array([0 if row is None else row for row in rows], np.int64),
        detected=np.array([row is not None for row in rows]),
        wrong_row=np.array([one.wrong_row or 0 for one in outcomes], np.int64),
        wrong_similarity=np.array([one.wrong_similarity for one in outcomes], np.float32),
        mistakable=np.array([one.wrong_row is not None for one in outcomes]),
        precision=tuple(one.precision for one in outcomes),
    )


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of one query; the defaults are those of a query that was not searched."""

    precision: Float[np.ndarray, "P"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    first_hit: int = 0
    wrong_row: int | None = None
    wrong_similarity: float = 0.0


def _outcome(
    search: GallerySearch, gallery: Gallery, similarity: Float[np.ndarray, "R"]
) -> _Outcome:
    """How one query fared in its gallery, whose detections have these similarities."""
    # What is right depends on the similarities too: of several detections on the person, the most
    # similar one counts, and the others are wrong.
    matches = search.true_positives(gallery, similarity)
    # The most similar wrong result tells why a query fails.
    wrong_row, wrong_similarity = None, 0.0
    if similarity.size > matches.size:
        others = similarity.copy()
        others[matches] = -np.inf
        best = int(others.argmax())
        wrong_row, wrong_similarity = search.kept_rows[gallery.rows[best]], others[best]
    return _Outcome(
        # AP needs no ranking, only how much scores as well as each hit.
        precision=precision_at_hits(similarity[matches], similarity),
        first_hit=_first_hit(gallery, similarity, matches) if matches.size else 0,
        wrong_row=wrong_row,
        wrong_similarity=wrong_similarity,
    )


def rank_gallery(
    protocol: SearchProtocol,
    detections: GalleryDetections,
    query: int,
    *,
    score_threshold: float,
    context: cbgm.ContextMatching | None = None,
) -> Ranking:
    """The ranked gallery of query number `query`; rules and errors as in `search_metrics`."""
    if not 0 <= query < len(protocol.query_image):
        raise UserError(
            f"protocol {protocol.name}: there is no query {query}; "
            f"expected 0 to {len(protocol.query_image) - 1}"
        )
    search = GallerySearch.prepare(protocol, detections, score_threshold, context)
    query_row = search.query_row(query)
    if query_row is None:
        none = np.zeros(0, np.int64)
        return Ranking(None, none, none, np.zeros((0, 4)), np.zeros(0, np.float32), none > 0)
    ((_, gallery, similarity),) = search.similarities(np.array([query]), np.array([query_row]))
    order = published_order(gallery, similarity)
    row = search.kept_rows[gallery.rows[order]]
    return Ranking(
        query_row=query_row,
        row=row,
        image=np.searchsorted(detections.offsets, row, side="right") - 1,
        boxes=detections.boxes[row],
        similarity=similarity[order],
        is_match=np.isin(order, search.true_positives(gallery, similarity)),
    )


def _first_hit(
    gallery: Gallery, similarity: Float[np.ndarray, "R"], matches: Int[np.ndarray, "P"]
) -> int:
    """Rank of the first true positive; sorts only if it is tied with something else."""
    best = similarity[matches].max()
    tied = np.count_nonzero(similarity == best)
    if tied == np.count_nonzero(similarity[matches] == best):
        return int(np.count_nonzero(similarity > best))
    return int(np.argmax(np.isin(published_order(gallery, similarity), matches)))


def found_people(
    people: Float[np.ndarray, "G 4"], boxes: Float[np.ndarray, "D 4"], iou_threshold: float
) -> Bool[np.ndarray, "D"]:
    """Which detections find somebody: detection and person are each other's best."""
    if len(people) == 0 or len(boxes) == 0:
        return np.zeros(len(boxes), bool)
    # The release compares IoUs that it stored as float32.
    overlap = np.asarray(iou(exact(people)[:, None], exact(boxes)[None]), np.float32)
    person = overlap.argmax(axis=0)
    detection = np.arange(len(boxes))
    mutual = overlap.argmax(axis=1)[person] == detection
    return mutual & (overlap[person, detection] >= iou_threshold)
