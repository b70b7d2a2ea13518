"""Context bipartite graph matching (SeqNet): people seen together vouch for each other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from alignps_jax.types import GalleryDetections


def context_people(
    detections: GalleryDetections, query_row: int, score_threshold: float, limit: int
) -> Int[np.ndarray, "P"]:
    """Rows of the query and of the best-scored other people of its photo, `limit` in all.

    Other people have a score of at least `score_threshold`, as in the gallery.
    """
    photo = detections.of(detections.image_of(query_row))
    others = photo.start + np.argsort(-detections.scores[photo], kind="stable")
    others = others[(detections.scores[others] >= score_threshold) & (others != query_row)]
    return np.concatenate([[query_row], others[: limit - 1]]).astype(np.int64)


def rescore(
    similarity: Float[np.ndarray, "R"],
    rows: Int[np.ndarray, "R"],
    offsets: Int[np.ndarray, "n_plus_1"],
    people: Int[np.ndarray, "P"],
    embeddings: Float[np.ndarray, "M D"],
    images: int,
) -> Float[np.ndarray, "R"]:
    """Similarities of one query's gallery detections after context matching (CBGM).

    The gallery detections are `rows` of `embeddings` (unit length), image after image: image i
    owns `offsets[i]:offsets[i + 1]` of them. In each of the `images` images with the most similar
    detections (ties to the earlier image), the people of the query photo (rows `people`, the query
    first) are matched with the image's detections so that the sum of the cosines is largest. That
    sum, which may exceed one, is the similarity of whom the query is matched with, if anybody.
    """
    rescored, occupied = similarity.copy(), np.flatnonzero(np.diff(offsets))
    context = embeddings[people].astype(np.float64)
    best = np.maximum.reduceat(similarity, offsets[occupied])
    for image in occupied[np.argsort(-best, kind="stable")[:images]]:
        segment = slice(int(offsets[image]), int(offsets[image + 1]))
        weights = context @ embeddings[rows[segment]].T.astype(np.float64)
        person, detection = linear_sum_assignment(weights, maximize=True)
        matched = detection[person == 0]
        rescored[segment.start + matched] = weights[person, detection].sum()
    return rescored
