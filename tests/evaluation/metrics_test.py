"""Detection and search metrics against literal versions of the published evaluations."""

import dataclasses

import numpy as np
import pytest
from scipy.io import loadmat
from sklearn.metrics import precision_recall_curve

from alignps_jax.evaluation import ranking as ranking_module
from alignps_jax.evaluation.metrics import (
    detection_metrics,
    mean_curve,
    precision_at_hits,
    rank_gallery,
    search_metrics,
)
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol
from tests.evaluation import metrics_oracles as oracle
from tests.places import SHARED


def lay_out(found, names=None):
    """{name: (boxes, scores, unit embeddings)} -> GalleryDetections."""
    names = tuple(found if names is None else names)
    counts = [len(found[name][1]) for name in names]
    boxes, scores, embeddings = (
        np.concatenate([found[name][part] for name in names]) for part in range(3)
    )
    return GalleryDetections(names, np.cumsum([0, *counts]), boxes, scores, embeddings)


def protocol_of(queries, names):
    """Queries (photo, box, [(name, box or None)]) -> SearchProtocol over `names`."""
    index = {name: i for i, name in enumerate(names)}
    targets = [[(n, b) for n, b in gallery if b is not None] for _, _, gallery in queries]
    return SearchProtocol(
        name="test",
        query_image=np.array([index[photo] for photo, _, _ in queries]),
        query_box=np.array([box for _, box, _ in queries], dtype=np.float32),
        gallery=tuple(np.array([index[n] for n, _ in g], dtype=int) for _, _, g in queries),
        target_images=tuple(np.array([index[n] for n, _ in t], dtype=int) for t in targets),
        target_boxes=tuple(
            np.array([b for _, b in t], dtype=np.float32).reshape(-1, 4) for t in targets
        ),
    )


def corners(xywh):
    return None if xywh is None else (*xywh[:2], xywh[0] + xywh[2], xywh[1] + xywh[3])


def in_corners(queries):
    return [(p, corners(box), [(n, corners(b)) for n, b in g]) for p, box, g in queries]


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embed(rng, identity, tied):
    """Embeddings [n, 16]. Tied ones are exact in float32 however they are summed."""
    if tied:
        centers = np.sign(np.random.default_rng(7).normal(size=(9, 16))) / 4
        flips = np.where(rng.random((len(identity), 16)) < 0.03, -1, 1)
        return (centers[identity % 9] * flips).astype(np.float32)
    centers = np.random.default_rng(7).normal(size=(99, 16))
    return unit(centers[identity % 99] + 0.7 * rng.normal(size=(len(identity), 16)))


def detect(rng, people, tied, false_alarms=3):
    """Detections of one image around {identity: box}, some people missed, some found twice."""
    identity = np.array([i for i in people for _ in range(rng.choice(3, p=(0.2, 0.5, 0.3)))], int)
    boxes = np.array([people[i] for i in identity], dtype=np.float64).reshape(-1, 4)
    side = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + rng.normal(size=boxes.shape) * side * 0.08
    count = rng.integers(0, false_alarms + 1)
    corner = rng.uniform(0, 300, (count, 2))
    boxes = np.concatenate([boxes, np.hstack([corner, corner + rng.uniform(5, 90, (count, 2))])])
    identity = np.concatenate([identity, rng.integers(0, 60, count)])
    # Some scores are exactly the threshold 0.2, many are tied.
    scores = rng.integers(1, 10, len(identity)) / 10 if tied else rng.uniform(0, 1, len(identity))
    order = np.argsort(-scores, kind="stable")
    parts = boxes.astype(np.float32), scores.astype(np.float32), embed(rng, identity, tied)
    return tuple(part[order] for part in parts)


def make_frames(rng, count, empty=0.1):
    """name -> (camera, {identity: integer box})."""
    frames = {}
    for number in range(count):
        corner = rng.integers(0, 300, (4, 2))
        size = rng.integers((5, 10), (60, 150), (4, 2))
        people = rng.choice(12, size=rng.integers(0, 5), replace=False)
        boxes = np.hstack([corner, corner + size]).astype(np.int32)
        frames[f"c{rng.integers(1, 4)}_{number}.jpg"] = (
            int(rng.integers(1, 4)),
            {} if rng.random() < empty else dict(zip(people.tolist(), boxes, strict=False)),
        )
    return frames


def compare_search(ours, expected, atol=1e-9):
    mean, top, aps, ranked = expected
    np.testing.assert_allclose(ours.per_query_ap, aps, atol=atol, rtol=0)
    assert abs(ours.mAP - mean) <= atol
    for k, value in ((1, ours.top1), (5, ours.top5), (10, ours.top10)):
        assert abs(value - top[k]) <= atol
        np.testing.assert_array_equal(ours.hits(k), [truth[:k].any() for truth in ranked])
    matches = [one.precision.size for one in ours.outcomes]
    np.testing.assert_array_equal(matches, [truth.sum() for truth in ranked])
    assert ours.curve.area == pytest.approx(ours.mAP, abs=1e-12)


def compare_rankings(protocol, detections, threshold, ranked):
    for query, truth in enumerate(ranked):
        ranking = rank_gallery(protocol, detections, query, score_threshold=threshold)
        np.testing.assert_array_equal(ranking.is_match, truth.astype(bool))


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.1])
def test_search_equals_cuhk_protocol_with_repeated_gallery_images(threshold):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frames = make_frames(rng, 20)
        found = {name: detect(rng, people, seed % 2 == 1) for name, (_, people) in frames.items()}
        queries = []
        for photo, (_, people) in frames.items():
            for person, (x, y, x2, y2) in people.items():
                # With replacement, in any order, perhaps with the query photo itself.
                gallery = []
                for name in rng.choice(list(frames), 9):
                    box = frames[name][1].get(person)
                    size = None if box is None else [*box[:2], *(box[2:] - box[:2])]
                    gallery.append((str(name), size))
                queries.append((photo, (x, y, x2 - x, y2 - y), gallery))
        protocol = protocol_of(in_corners(queries), frames)
        expected = oracle.search_cuhk(queries, found, threshold)
        detections = lay_out(found)
        compare_search(search_metrics(protocol, detections, score_threshold=threshold), expected)
        compare_rankings(protocol, detections, threshold, expected[3])


@pytest.fixture(scope="module")
def real_queries():
    path = SHARED / "TestG100.mat"
    if not path.exists():
        pytest.skip("no ../shared/data/TestG100.mat")
    queries = []
    for item in loadmat(path)["TestG100"].squeeze():
        query = item["Query"][0, 0]
        gallery = [
            (str(row[0][0]), row[1][0].astype(np.int32) if row[1].size else None)
            for row in item["Gallery"].squeeze()
        ]
        xywh = query["idlocate"].ravel().astype(np.int32)
        queries.append((str(query["imname"][0]), str(query["idname"][0]), xywh, gallery))
    return queries


@pytest.mark.parametrize("context", [(), (10, 3), (30, 4)])
def test_search_on_the_real_g100_protocol(real_queries, context):
    # The odd ones: query photo in its own gallery (493, 2132), a gallery image listed twice.
    every = 400 if context else 60
    chosen = [493, 1250, 1633, 1997, 2132, 2561, *range(0, 2900, every)]
    queries = [real_queries[i] for i in chosen]
    people = {}
    for photo, identity, xywh, gallery in queries:
        for name, box in [(photo, xywh), *gallery]:
            boxes = people.setdefault(name, {})
            if box is not None:
                boxes[int(identity[1:])] = corners(box)
    rng = np.random.default_rng(5)
    found = {name: detect(rng, boxes, tied=False, false_alarms=5) for name, boxes in people.items()}
    queries = [(photo, xywh, gallery) for photo, _, xywh, gallery in queries]
    detections = lay_out(found)
    ours = search_metrics(
        protocol_of(in_corners(queries), found), detections, score_threshold=0.2, context=context
    )
    compare_search(ours, oracle.search_cuhk(queries, found, 0.2, context or None))
    assert 0.1 < ours.mAP < 0.95


def gallery_case(cosines, hits, targets):
    """One query over one-detection images with these cosines; `hits` hold the person."""
    angle = np.arccos(np.array([1.0, *cosines]))
    embeddings = unit(np.stack([np.cos(angle), np.sin(angle)], 1))
    count = len(cosines) + 1
    names = tuple(f"{i}.jpg" for i in range(count + 1))
    box = np.array([10, 20, 50, 120], np.float32)
    detections = GalleryDetections(
        names=names,
        offsets=np.array([*range(count + 1), count]),
        boxes=np.tile(box, (count, 1)),
        scores=np.full(count, 0.9, np.float32),
        embeddings=embeddings,
    )
    # The last image is empty, and holds the person if `targets` exceeds the hits.
    missed = [count] * (targets - len(hits))
    images = np.array([h + 1 for h in hits] + missed, dtype=int)
    protocol = SearchProtocol(
        name="case",
        query_image=np.array([0]),
        query_box=box[None],
        gallery=(np.arange(1, count + 1),),
        target_images=(images,),
        target_boxes=(np.tile(box, (len(images), 1)),),
    )
    return protocol, detections


@pytest.mark.parametrize(
    ("cosines", "hits", "targets", "ap", "first"),
    [
        ((0.9, 0.8, 0.7, 0.6), (0,), 1, 1.0, 0),
        ((0.9, 0.8, 0.7, 0.6), (0, 2), 3, (1 + 2 / 3) / 3, 0),
        ((0.1, 0.8, 0.7, 0.6), (0,), 1, 1 / 4, 3),
        ((0.5, 0.5, 0.1), (0,), 1, 1 / 2, None),  # tied with a stranger: one step
        ((0.5, 0.5, 0.1), (0, 1), 2, 1.0, 0),
        ((0.5, 0.4), (), 0, 0.0, None),  # nobody to be found
        ((0.5, 0.4), (), 1, 0.0, None),  # to be found in an image without detections
        ((), (), 1, 0.0, None),
    ],
)
def test_search_values_by_hand(cosines, hits, targets, ap, first):
    protocol, detections = gallery_case(cosines, hits, targets)
    result = search_metrics(protocol, detections, score_threshold=0.2)
    assert result.mAP == pytest.approx(ap, abs=1e-12)
    (outcome,) = result.outcomes
    assert outcome.num_targets == targets
    assert (outcome.first_hit is not None) == bool(hits)
    if first is not None:
        assert outcome.first_hit == first
        assert (result.top1, result.top5, result.top10) == (first == 0, 1.0, 1.0)
    ranking = rank_gallery(protocol, detections, 0, score_threshold=0.2)
    assert ranking.is_match.sum() == len(hits)
    assert (np.diff(ranking.similarity) <= 0).all()


def test_query_overlap_has_widths_plus_one():
    # Two boxes tie at IoU 0 without the extra pixel; with it, the adjacent one wins.
    protocol, detections = gallery_case((0.9,), (0,), 1)
    boxes = np.array([[200, 200, 210, 210], [51, 20, 60, 120], *detections.boxes[1:]], np.float32)
    photo = dataclasses.replace(
        detections,
        offsets=np.array([0, 2, 3, 3]),
        boxes=boxes,
        scores=np.full(3, 0.9, np.float32),
        embeddings=unit(np.array([[0, 1], [1, 0], [1, 0.1]])),
    )
    wider = dataclasses.replace(photo, boxes=boxes - np.float32([[0], [0.5], [0]]))
    for found, similarity in ((photo, 0.0995), (wider, 0.995)):
        ranking = rank_gallery(protocol, found, 0, score_threshold=0.2)
        np.testing.assert_allclose(ranking.similarity, [similarity], atol=1e-4)


def flat(outcome):
    """All of an outcome as one row of numbers."""
    values = (getattr(outcome, field.name) for field in dataclasses.fields(outcome))
    return np.hstack([-1 if value is None else value for value in values])


def random_case(seed, tied=False):
    """All people of some frames, each searched in the other frames."""
    rng = np.random.default_rng(seed)
    frames = make_frames(rng, 15, empty=0)
    found = {name: detect(rng, people, tied) for name, (_, people) in frames.items()}
    queries = [
        (n, box, [(m, p.get(i)) for m, (_, p) in frames.items() if m != n])
        for n, (_, people) in frames.items()
        for i, box in people.items()
    ]
    return frames, protocol_of(queries, frames), lay_out(found)


@pytest.mark.parametrize("cost", [0, 10**9])  # always, never fetch a query's detections one by one
def test_results_do_not_depend_on_blocks(monkeypatch, cost):
    _, protocol, detections = random_case(3)
    whole = search_metrics(protocol, detections, score_threshold=0.2)
    for name, value in {"QUERY_ROWS": 4, "GALLERY_ROWS": 7, "GATHER_COST": cost}.items():
        monkeypatch.setattr(ranking_module, name, value)
    pieces = search_metrics(protocol, detections, score_threshold=0.2)
    for one, other in zip(whole.outcomes, pieces.outcomes, strict=True):
        np.testing.assert_array_equal(flat(one), flat(other))


def annotations_of(frames):
    people = [people for _, people in frames.values()]
    identity = tuple(np.array(list(p), dtype=int) for p in people)
    return Annotations(
        names=tuple(frames),
        boxes=tuple(np.array(list(p.values()), np.float32).reshape(-1, 4) for p in people),
        identity=identity,
        labeled=tuple(ids < 7 for ids in identity),
        camera=np.array([camera for camera, _ in frames.values()]),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7, 2.0])
@pytest.mark.parametrize("labeled_only", [False, True])
def test_detection_equals_published_protocol(tied, threshold, labeled_only):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        frames = make_frames(rng, 15)
        found = {name: detect(rng, people, tied) for name, (_, people) in frames.items()}
        people = {
            name: [box for i, box in persons.items() if i < 7 or not labeled_only]
            for name, (_, persons) in frames.items()
        }
        if labeled_only:
            people = {name: boxes for name, boxes in people.items() if boxes}
        recall, ap = oracle.detection(people, found, threshold)
        rules = {"score_threshold": threshold, "labeled_only": labeled_only}
        ours = detection_metrics(annotations_of(frames), lay_out(found), **rules)
        assert abs(ours.recall - recall) <= 1e-9
        assert abs(ours.AP - ap) <= 1e-9
        assert ours.curve.area == pytest.approx(ours.AP, abs=1e-12)
        found_some = np.flatnonzero(ours.curve.precision)
        assert ours.recall == (ours.curve.edges[found_some[-1] + 1] if found_some.size else 0)


def test_detection_without_people_or_detections_is_zero():
    _, detections = gallery_case((0.9, 0.8), (0,), 1)
    nobody = annotations_of({name: (1, {}) for name in detections.names})
    someone = annotations_of({name: (1, {0: (1, 2, 3, 4)}) for name in detections.names})
    for people, threshold in ((nobody, 0.2), (someone, 1.0)):
        result = detection_metrics(people, detections, score_threshold=threshold)
        assert (result.recall, result.AP, result.curve.area) == (0, 0, 0)


def test_ranking_names_what_it_ranked():
    protocol, detections = gallery_case((0.3, 0.9, 0.6), (0, 1), 2)
    ranking = rank_gallery(protocol, detections, 0, score_threshold=0.2)
    assert ranking.image.tolist() == ranking.row.tolist() == [2, 3, 1]
    assert ranking.is_match.tolist() == [True, False, True]
    np.testing.assert_allclose(ranking.similarity, [0.9, 0.6, 0.3], atol=1e-6)
    np.testing.assert_array_equal(ranking.boxes, detections.boxes[ranking.row])


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
