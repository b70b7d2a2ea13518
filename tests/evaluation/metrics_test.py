"""Detection and search metrics against literal versions of the published evaluations."""

import numpy as np
import pytest
from scipy.io import loadmat

from alignps_jax.evaluation import detections_io
from alignps_jax.evaluation import ranking as ranking_module
from alignps_jax.evaluation.metrics import detection_metrics, mean_curve, search_metrics
from alignps_jax.evaluation.ranking import GallerySearch
from alignps_jax.types import Annotations, Detections, SearchProtocol
from tests.evaluation import metrics_oracles as oracle
from tests.places import SHARED


def lay_out(found, names=None):
    """{name: (boxes, scores, unit embeddings)} -> GalleryDetections."""
    names = list(found if names is None else names)
    valid = (np.ones(len(found[name][1]), bool) for name in names)
    all_of_them = [Detections(*found[name], own) for name, own in zip(names, valid, strict=True)]
    return detections_io.lay_out(names, all_of_them)


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


def make_frames(rng, count):
    """name -> (camera, {identity: integer box}); one in ten is empty."""
    frames = {}
    for number in range(count):
        corner = rng.integers(0, 300, (4, 2))
        boxes = np.hstack([corner, corner + rng.integers((5, 10), (60, 150), (4, 2))])
        people = rng.choice(12, size=rng.integers(0, 5), replace=False).tolist()
        camera = int(rng.integers(1, 4))
        held = {} if rng.random() < 0.1 else dict(zip(people, boxes, strict=False))
        frames[f"c{camera}s1_{number:06}.jpg"] = camera, held
    return frames


def compare_search(ours, expected):
    mean, top, aps, ranked = expected
    np.testing.assert_allclose(ours.per_query_ap, aps, atol=1e-9, rtol=0)
    assert abs(ours.mAP - mean) <= 1e-9
    for k, value in ((1, ours.top1), (5, ours.top5), (10, ours.top10)):
        assert abs(value - top[k]) <= 1e-9
        np.testing.assert_array_equal(ours.hits(k), [truth[:k].any() for truth in ranked])
    matches = [one.precision.size for one in ours.outcomes]
    np.testing.assert_array_equal(matches, [truth.sum() for truth in ranked])
    assert ours.curve.area == pytest.approx(ours.mAP, abs=1e-12)


@pytest.mark.parametrize(
    ("threshold", "blocks"),
    [(0.0, (4, 7, 0)), (0.2, ()), (0.5, (4, 7, 10**9)), (1.1, ())],  # rows, rows, cost of fetching
)
def test_search_equals_cuhk_protocol_with_repeated_gallery_images(threshold, blocks, monkeypatch):
    for name, value in zip(("QUERY_ROWS", "GALLERY_ROWS", "GATHER_COST"), blocks, strict=False):
        monkeypatch.setattr(ranking_module, name, value)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frames = make_frames(rng, 20)
        found = {name: detect(rng, people, seed % 2 == 1) for name, (_, people) in frames.items()}
        queries = []
        for photo, (_, people) in frames.items():
            for person, box in people.items():
                # With replacement, in any order, perhaps with the query photo itself.
                gallery = rng.choice(list(frames), 9).tolist()
                gallery = [(name, frames[name][1].get(person)) for name in gallery]
                queries.append((photo, box, gallery))
        expected = oracle.search(queries, found, threshold)
        search = GallerySearch(protocol_of(queries, frames), lay_out(found), threshold)
        ours = search_metrics(search)
        compare_search(ours, expected)
        rankings = dict(search.rankings(range(len(queries))))
        truths = [truth for truth in expected[3] if truth.size]
        numbers = [np.zeros(4), *((t.size, t.sum(), 1, not t.all()) for t in truths)]
        assert ours.counts.sum(axis=1).tolist() == np.sum(numbers, axis=0).astype(int).tolist()
        high = np.concatenate([one.similarity[one.is_match] for one in rankings.values()]) >= 0.5
        assert ours.counts[1, 150:].sum() == high.sum()
        for query, truth in enumerate(expected[3]):
            assert query in rankings or not truth.size
            if query in rankings:
                np.testing.assert_array_equal(rankings[query].is_match, truth.astype(bool))
                wrong = rankings[query].row[truth == 0]
                assert ours.outcomes[query].wrong_row == (wrong[0] if wrong.size else None)


def corners(xywh):
    """A box x1, y1, x2, y2 of whole numbers, as the release takes it; None of an empty one."""
    box = xywh.ravel().astype(np.int32)
    return np.concatenate([box[:2], box[:2] + box[2:]]) if box.size else None


@pytest.fixture(scope="module")
def real_queries():
    path = SHARED / "TestG100.mat"
    if not path.exists():
        pytest.skip("no ../shared/data/TestG100.mat")
    queries = []
    for item in loadmat(path)["TestG100"].squeeze():
        query = item["Query"][0, 0]
        gallery = [(str(name[0]), corners(box)) for name, box, _ in item["Gallery"].squeeze()]
        asked = str(query["imname"][0]), corners(query["idlocate"]), gallery
        queries.append((int(query["idname"][0][1:]), asked))
    return queries


@pytest.mark.parametrize("context", [(), (10, 3), (30, 4)])
def test_search_on_the_real_g100_protocol(real_queries, context):
    # The odd ones: query photo in its own gallery (493, 2132), a gallery image listed twice.
    every = 400 if context else 60
    chosen = [493, 1250, 1633, 1997, 2132, 2561, *range(0, 2900, every)]
    queries, people = [real_queries[i][1] for i in chosen], {}
    for identity, (photo, query, gallery) in (real_queries[i] for i in chosen):
        for name, box in [(photo, query), *gallery]:
            boxes = people.setdefault(name, {})
            if box is not None:
                boxes[identity] = box
    rng = np.random.default_rng(5)
    found = {name: detect(rng, boxes, tied=False, false_alarms=5) for name, boxes in people.items()}
    search = GallerySearch(protocol_of(queries, found), lay_out(found), 0.2, context)
    ours = search_metrics(search)
    compare_search(ours, oracle.search(queries, found, 0.2, context or None))
    assert 0.1 < ours.mAP < 0.95


def gallery_case(cosines, hits, targets):
    """One query over one-detection images with these cosines; `hits` hold the person.

    The last image is empty, and holds the person if `targets` exceeds the hits.
    """
    angle, box = np.arccos(np.array([1.0, *cosines])), np.array([10, 20, 50, 120], np.float32)
    score = np.full(1, 0.9, np.float32)
    embeddings = unit(np.stack([np.cos(angle), np.sin(angle)], 1))
    found = {f"{i}.jpg": (box[None], score, one[None]) for i, one in enumerate(embeddings)}
    found["empty.jpg"] = box[None][:0], score[:0], embeddings[:0]
    held = [number in hits for number in range(len(cosines))] + [targets > len(hits)]
    gallery = [(name, box if on else None) for name, on in zip([*found][1:], held, strict=True)]
    return protocol_of([("0.jpg", box, gallery)], found), found


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
    protocol, found = gallery_case(cosines, hits, targets)
    search = GallerySearch(protocol, lay_out(found), 0.2)
    result = search_metrics(search)
    assert result.mAP == pytest.approx(ap, abs=1e-12)
    (outcome,) = result.outcomes
    assert (outcome.num_targets, outcome.first_hit < np.inf) == (targets, bool(hits))
    if first is not None:
        assert outcome.first_hit == first
        assert (result.top1, result.top5, result.top10) == (first == 0, 1.0, 1.0)
    ((_, ranking),) = search.rankings([0])
    np.testing.assert_allclose(ranking.similarity, sorted(cosines)[::-1], atol=1e-6)
    assert sorted(ranking.row[ranking.is_match] - 1) == list(hits)


def test_query_overlap_has_widths_plus_one():
    # Two boxes tie at IoU 0 without the extra pixel; with it, the adjacent one wins.
    protocol, found = gallery_case((0.9,), (0,), 1)
    boxes = np.array([[200, 200, 210, 210], [51, 20, 60, 120]], np.float32)
    embeddings, scores = np.eye(2, dtype=np.float32)[::-1], np.full(2, 0.9, np.float32)
    for shift, similarity in ((0, 0.436), (0.5, 0.9)):
        found["0.jpg"] = boxes - np.float32([[0], [shift]]), scores, embeddings
        ((_, ranking),) = GallerySearch(protocol, lay_out(found), 0.2).rankings([0])
        np.testing.assert_allclose(ranking.similarity, [similarity], atol=1e-3)


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


def test_detection_without_people_is_zero():
    _, found = gallery_case((0.9, 0.8), (0,), 1)
    nobody = annotations_of({name: (1, {}) for name in found})
    result = detection_metrics(nobody, lay_out(found), score_threshold=0.2)
    assert (result.recall, result.AP, result.curve.area) == (0, 0, 0)


def test_mean_of_curves_by_hand():
    # Half, a third (one of three found), and a query without any hit.
    curve = mean_curve([(np.array([0.5, 1.0]), 2), (np.array([0.25]), 3), (np.zeros(0), 1)])
    np.testing.assert_allclose(curve.edges, [0, 1 / 3, 1 / 2, 1])
    np.testing.assert_allclose(curve.precision, [1.25 / 3, 1 / 3, 0.5 / 3])
    assert curve.area == pytest.approx((0.75 + 0.25 / 3 + 0) / 3)
