"""Context matching against every possible assignment, and on a case worked out by hand."""

import itertools

import numpy as np
import pytest

from alignps_jax.evaluation import cbgm
from alignps_jax.evaluation.metrics import rank_gallery, search_metrics
from alignps_jax.types import GalleryDetections, SearchProtocol


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def best_assignment(weights):
    """(detection of person 0 or None, total) of the best matching, by trying all of them."""
    people, detections = weights.shape
    best = (-np.inf, None)
    if people <= detections:
        for chosen in itertools.permutations(range(detections), people):
            total = sum(weights[i, j] for i, j in enumerate(chosen))
            best = max(best, (total, chosen[0]), key=lambda pair: pair[0])
    else:
        for chosen in itertools.permutations(range(people), detections):
            total = sum(weights[i, j] for j, i in enumerate(chosen))
            mate = chosen.index(0) if 0 in chosen else None
            best = max(best, (total, mate), key=lambda pair: pair[0])
    return best[1], best[0]


@pytest.mark.parametrize("images", [1, 3, 99])
@pytest.mark.parametrize("people", [1, 2, 4])
def test_rescore_equals_best_of_all_assignments(images, people):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, 6, 7)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        total = offsets[-1]
        embeddings = unit(rng.normal(size=(total + people, 5)))
        rows = rng.permutation(total)
        context = total + np.arange(people)
        similarity = embeddings[rows] @ embeddings[total]
        ours = cbgm.rescore(similarity, rows, offsets, context, embeddings, images)

        expected = similarity.copy()
        occupied = [i for i in range(7) if counts[i]]
        occupied.sort(key=lambda i: -similarity[offsets[i] : offsets[i + 1]].max())
        for i in occupied[:images]:
            block = embeddings[rows[offsets[i] : offsets[i + 1]]]
            mate, value = best_assignment(embeddings[context] @ block.T)
            if mate is not None:
                expected[offsets[i] + mate] = value
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert ours.dtype == similarity.dtype


def scene():
    """A query with a companion; a lookalike alone is closer than the pair in the other image."""
    a, b = np.eye(4)[:2]
    box = [[0, 0, 30, 80], [50, 0, 80, 80]]
    rows = [
        (box[0], 0.8, a),
        (box[1], 0.9, b),
        ([90, 0, 99, 50], 0.1, np.eye(4)[2]),  # not confident: no companion
        (box[0], 0.9, a + 0.3 * np.eye(4)[3]),
        (box[0], 0.7, a + 0.5 * np.eye(4)[3]),
        (box[1], 0.6, b),
    ]
    detections = GalleryDetections(
        names=("query", "lookalike", "pair"),
        offsets=np.array([0, 3, 4, 6]),
        boxes=np.array([row[0] for row in rows], np.float32),
        scores=np.array([row[1] for row in rows], np.float32),
        embeddings=unit([row[2] for row in rows]),
    )
    protocol = SearchProtocol(
        name="scene",
        query_image=np.array([0]),
        query_box=np.array([box[0]], np.float32),
        gallery=(np.array([1, 2]),),
        target_images=(np.array([2]),),
        target_boxes=(np.array([box[0]], np.float32),),
    )
    return protocol, detections


def test_companion_decides_the_search():
    protocol, detections = scene()
    plain = search_metrics(protocol, detections, score_threshold=0.2)
    helped = search_metrics(protocol, detections, score_threshold=0.2, context=(10, 3))
    assert (plain.mAP, plain.top1) == (0.5, 0.0)
    assert (helped.mAP, helped.top1) == (1.0, 1.0)
    ranking = rank_gallery(protocol, detections, 0, score_threshold=0.2, context=(10, 3))
    assert ranking.row.tolist() == [4, 3, 5]
    np.testing.assert_allclose(ranking.similarity[0], 1 / np.sqrt(1.25) + 1, atol=1e-6)


def test_context_people_are_the_most_confident_after_the_query():
    _, detections = scene()
    people = [cbgm.context_people(detections, 0, 0, 0.2, limit).tolist() for limit in (1, 2, 9)]
    assert people == [[0], [0, 1], [0, 1]]
    assert cbgm.context_people(detections, 0, 2, 0.2, 9).tolist() == [2, 1, 0]
    assert cbgm.context_people(detections, 0, 0, 0.0, 9).tolist() == [0, 1, 2]
