"""Curves against scikit-learn, and their areas against the published metrics."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from alignps_jax.evaluation.cbgm import ContextMatching
from alignps_jax.evaluation.metrics import detection_metrics, search_metrics
from alignps_jax.evaluation.precision_recall import mean_curve, precision_at_hits
from alignps_jax.types import GalleryDetections
from tests.evaluation.metrics_test import annotations_of, detect, lay_out, make_frames, protocol_of


def precision_at(curve, recall):
    """The curve's value at a recall that is no edge."""
    return curve.precision[np.searchsorted(curve.edges, recall) - 1]


@pytest.mark.parametrize("tied", [False, True])
def test_one_ranking_against_scikit_learn(tied):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = rng.random(23) < 0.4
        truth[0] = True
        scores = rng.integers(0, 6, 23) / 5 if tied else rng.random(23)
        curve = mean_curve([(precision_at_hits(scores[truth], scores), int(truth.sum()))])
        precision, recall, _ = precision_recall_curve(truth, scores)
        for value in np.linspace(0.01, 0.99, 57):
            # The least recall at or above this value, with as many hits as ties bring at once.
            best = np.flatnonzero(recall >= value)[-1]
            assert precision_at(curve, value) == pytest.approx(precision[best], abs=1e-12)


def test_mean_of_curves_by_hand():
    # Half, a third (one of three found), and a query without any hit.
    curve = mean_curve([(np.array([0.5, 1.0]), 2), (np.array([0.25]), 3), (np.zeros(0), 1)])
    np.testing.assert_allclose(curve.edges, [0, 1 / 3, 1 / 2, 1])
    np.testing.assert_allclose(curve.precision, [1.25 / 3, 1 / 3, 0.5 / 3])
    assert curve.area == pytest.approx((0.75 + 0.25 / 3 + 0) / 3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("context", [None, ContextMatching(images=2, people=2)])
def test_areas_are_the_published_metrics(tied, context):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frames = make_frames(rng, 15)
        found = {name: detect(rng, people, tied) for name, (_, people) in frames.items()}
        names, detections = list(frames), lay_out(found)
        queries = [
            (photo, box, [(n, others.get(i)) for n, (_, others) in frames.items() if n != photo])
            for photo, (_, people) in frames.items()
            for i, box in people.items()
        ]
        queries = [query for query in queries if any(box is not None for _, box in query[2])]
        protocol = protocol_of(queries, names)
        metrics = search_metrics(protocol, detections, score_threshold=0.2, context=context)
        assert metrics.curve.area == pytest.approx(metrics.mAP, abs=1e-12)
        metrics = detection_metrics(annotations_of(frames), detections, score_threshold=0.2)
        curve = metrics.curve
        assert curve.area == pytest.approx(metrics.AP, abs=1e-12)
        assert curve.edges[np.flatnonzero(curve.precision)[-1] + 1] == metrics.recall


def test_no_detections():
    frames = make_frames(np.random.default_rng(1), 5)
    names = tuple(frames)
    none = np.zeros((0, 4), np.float32)
    nothing = GalleryDetections(names, np.zeros(6, int), none, none[:, 0], none)
    found = detection_metrics(annotations_of(frames), nothing, score_threshold=0.0)
    assert found.curve.area == 0
    queries = [(names[0], (0, 0, 9, 9), [(names[1], (0, 0, 9, 9))])]
    search = search_metrics(protocol_of(queries, names), nothing, score_threshold=0.0)
    np.testing.assert_array_equal(search.curve.precision, [0])
