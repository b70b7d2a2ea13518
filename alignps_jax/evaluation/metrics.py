"""The published figures: detection AP and recall, search mAP and top-k.

Search follows the released evaluation of CUHK-SYSU and PRW, which is one and the same but for the
gallery, and that is the protocol's business. Where the release leaves a case open or crashes:

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
from alignps_jax.evaluation.detections_io import align_detections, check_detections
from alignps_jax.evaluation.ranking import Gallery, GallerySearch, exact, published_order
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol, UserError


@dataclasses.dataclass(frozen=True)
class DetectionMetrics:
    """How many people were found (`recall`) and how well (`AP`), both from 0 to 1."""

    recall: float
    AP: float
    num_people: int
    num_detections: int


@dataclasses.dataclass(frozen=True)
class SearchMetrics:
    """Search figures from 0 to 1, and what became of each of the Q queries.

    `first_hit[q]` is the rank, from 0, of the first true positive, meaningful where `found[q]`.
    `query_row[q]` is the detection that gave the query's embedding, meaningful where
    `detected[q]`. `num_matches[q]` of the `num_targets[q]` gallery images that hold the person
    have a true positive. `wrong_row[q]` is the most similar gallery detection that is none (the
    first of equals) and `wrong_similarity[q]` its similarity, meaningful where `mistakable[q]`.
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
    labelled_only: bool = False,
) -> DetectionMetrics:
    """Detection recall and AP as SeqNet's evaluation computes them.

    A detection finds a person if their IoU reaches `iou_threshold` and each is the other's best
    (the first of equals). AP is the average precision of the detections with a score of at least
    `score_threshold`, times recall; 0 without people or detections. `labelled_only` counts only
    people with an identity, and leaves out images that have none (but not the detections of
    unlabelled people in the others).

    Raises:
      UserError: an image of `annotations` is missing from `detections`, or those are not valid.
    """
    check_detections(detections, "detections")
    aligned = align_detections(detections, annotations.names, "detections")
    scores, found, num_people = [], [], 0
    for image, boxes in enumerate(annotations.boxes):
        if labelled_only:
            boxes = boxes[annotations.labelled[image]]
            if len(boxes) == 0:
                continue
        rows = aligned.of(image)
        kept = aligned.scores[rows] >= float(score_threshold)
        scores.append(aligned.scores[rows][kept])
        found.append(found_people(boxes, aligned.boxes[rows][kept], iou_threshold))
        num_people += len(boxes)
    all_scores = np.concatenate([*scores, np.zeros(0, np.float32)])
    hit_scores = all_scores[np.concatenate([*found, np.zeros(0, bool)])]
    people = max(num_people, 1)
    return DetectionMetrics(
        recall=hit_scores.size / people,
        AP=float(_precision_at(hit_scores, all_scores).sum()) / people,
        num_people=num_people,
        num_detections=all_scores.size,
    )


def search_metrics(
    protocol: SearchProtocol,
    detections: GalleryDetections,
    *,
    score_threshold: float,
    context: cbgm.ContextMatching | None = None,
) -> SearchMetrics:
    """Search mAP and top-1, -5, -10 of `protocol`, whose image indices are those of `detections`.

    The query's embedding is that of the detection that overlaps the query box most, whatever its
    score. Gallery detections with a score of at least `score_threshold` are ranked by cosine. In
    an image that holds the person, the most similar detection with IoU >= min(0.5,
    wh / ((w + 10)(h + 10))) is the true positive; w, h are those of the person's box. AP is the
    average precision times the share of images with a true positive. `context` adds SeqNet's
    bipartite matching.

    Raises:
      UserError: invalid detections, a protocol without queries, with image indices that
        `detections` does not have, or with target images that are not in the gallery.
    """
    search = GallerySearch.prepare(protocol, detections, score_threshold, context)
    Q = len(protocol.query_image)
    rows = [search.query_row(query) for query in range(Q)]
    detected = np.array([row is not None for row in rows])
    query_row = np.array([0 if row is None else row for row in rows])
    ap, found = np.zeros(Q), np.zeros(Q, bool)
    first_hit, num_matches = np.zeros(Q, np.int64), np.zeros(Q, np.int64)
    wrong_row, wrong_similarity = np.zeros(Q, np.int64), np.zeros(Q, np.float32)
    mistakable = np.zeros(Q, bool)
    asked = np.flatnonzero(detected)
    for query, gallery, similarity in search.similarities(asked, query_row[asked]):
        matches = search.true_positives(gallery, similarity)
        num_matches[query] = matches.size
        if matches.size:
            found[query] = True
            precision = _precision_at(similarity[matches], similarity)
            ap[query] = precision.sum() / gallery.target_positions.size
            first_hit[query] = _first_hit(gallery, similarity, matches)
        if similarity.size > matches.size:
            others = similarity.copy()
            others[matches] = -np.inf
            best = int(others.argmax())
            mistakable[query] = True
            wrong_row[query] = search.kept_rows[gallery.rows[best]]
            wrong_similarity[query] = others[best]
    top = {k: float(np.mean(found & (first_hit < k))) for k in (1, 5, 10)}
    return SearchMetrics(
        mAP=float(ap.mean()),
        top1=top[1],
        top5=top[5],
        top10=top[10],
        per_query_ap=ap,
        first_hit=first_hit,
        found=found,
        num_targets=np.array([len(images) for images in protocol.target_images]),
        num_matches=num_matches,
        query_row=query_row,
        detected=detected,
        wrong_row=wrong_row,
        wrong_similarity=wrong_similarity,
        mistakable=mistakable,
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
        return np.count_nonzero(similarity > best)
    return int(np.argmax(np.isin(published_order(gallery, similarity), matches)))


def _precision_at(
    hit_scores: Float[np.ndarray, "P"], scores: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "P"]:
    """Precision among everything that scores at least as much, for each hit (equals together).

    Its mean over the hits is scikit-learn's average precision, hence its sum over the number of
    things to be found is average precision times recall.
    """
    if hit_scores.size == 0:
        return np.zeros(0)
    hits = np.sort(hit_scores)
    above = np.sort(scores[scores >= hits[0]])
    true = hits.size - np.searchsorted(hits, hits)
    return true / (above.size - np.searchsorted(above, hits))


def found_people(
    people: Float[np.ndarray, "G 4"], boxes: Float[np.ndarray, "D 4"], iou_threshold: float
) -> Bool[np.ndarray, "D"]:
    """Which detections find somebody: detection and person are each other's best."""
    if len(people) == 0 or len(boxes) == 0:
        return np.zeros(len(boxes), bool)
    # The release compares IoUs that it stored as float32.
    overlap = iou(exact(people)[:, None], exact(boxes)[None]).astype(np.float32)
    person = overlap.argmax(axis=0)
    detection = np.arange(len(boxes))
    mutual = overlap.argmax(axis=1)[person] == detection
    return mutual & (overlap[person, detection] >= iou_threshold)
