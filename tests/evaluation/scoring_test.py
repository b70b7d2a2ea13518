"""Saved detections against the literal protocols, over miniature folders without any photo."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.evaluation.detections_io import load_detections
from alignps_jax.evaluation.scoring import evaluate_detections, make_scorer, scorer_of
from alignps_jax.types import UserError
from configs.cuhk import get_config
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.evaluation import metrics_oracles as oracle
from tests.evaluation.metrics_test import detect, lay_out

FILES = ("TestG50", "TestG100", "TestG4000", "Occlusion", "Resolution")


def xywh(box):
    return [int(v) for v in (*box[:2], *(box[2:] - box[:2]))]


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    """A folder with all kinds of protocols, its queries by file, and detections by image."""
    rng = np.random.default_rng(11)
    root = tmp_path_factory.mktemp("cuhk")
    people = {}
    for number in range(24):
        corner = rng.integers(0, 300, (3, 2))
        boxes = np.hstack([corner, corner + rng.integers((5, 10), (60, 150), (3, 2))])
        chosen = rng.choice(6, rng.integers(1, 4), replace=False).tolist()
        people[f"s{number}.jpg"] = dict(zip(chosen, boxes, strict=False))
    people["s7.jpg"] = {}
    queries = {}
    for file, size in zip(FILES, (6, 12, 20, 8, 8), strict=True):
        rows = []
        for person in range(6) if file.startswith("Test") else range(2, 5):
            homes = [name for name, held in people.items() if person in held]
            gallery = [*homes[1:4], *rng.choice(list(people), size).tolist()]
            cells = [(n, xywh(people[n][person]) if person in people[n] else None) for n in gallery]
            rows.append(((homes[0], xywh(people[homes[0]][person])), f"p{person}", cells))
        queries[file] = rows
    images = {name: [xywh(box) for box in held.values()] for name, held in people.items()}
    train = {"p99": [("t.jpg", (1, 2, 3, 4))]}
    fixtures.write_cuhk(root, images | {"t.jpg": [(1, 2, 3, 4)]}, list(people), train, queries)
    found = {name: detect(rng, held, tied=False) for name, held in people.items()}
    # A query photo without detections, a gallery image without any.
    blind = queries["Occlusion"][0][0][0]
    for name in (blind, "s9.jpg"):
        found[name] = tuple(part[:0] for part in found[name])
    return root, queries, found, people


def config_for(root, **evaluation):
    config = get_config()
    config.data.root = str(root)
    config.eval.update(evaluation)
    return config


def save(path: Path, found, scale=1.0, names=None):
    """The file as another program may write it: other order, other scale, other dtypes."""
    detections = lay_out(found, names)
    arrays = {
        "image_names": np.array(detections.names),
        "offsets": detections.offsets.astype(np.int64),
        "boxes": detections.boxes,
        "scores": detections.scores,
        "embeddings": detections.embeddings.astype(np.float64) * scale,
    }
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("context", "threshold"), [((), 0.2), ((3, 2), 0.2), ((2, 4), 0.2), ((99, 1), 0.6)]
)
def test_every_protocol_of_a_folder_in_one_run(cuhk, tmp_path, context, threshold, capsys):
    root, queries, found, people = cuhk
    rng = np.random.default_rng(1)
    extra = {**found, "elsewhere.jpg": found["s1.jpg"]}
    names = rng.permutation(list(extra)).tolist()
    file = save(tmp_path / "mine.npz", extra, scale=7.5, names=names)
    before = file.read_bytes()
    order = ["TestG100", "TestG50", "TestG4000", "all", "occlusion", "resolution"]
    settings = {"context_matching": context, "score_threshold": threshold}
    evaluate_detections(config_for(root, protocols=tuple(order), **settings), file)
    assert file.read_bytes() == before
    results = tmp_path / "mine_rescored"
    metrics = json.loads((results / "metrics.json").read_text())
    assert list(metrics["search"]) == order
    assert (metrics["context_matching"], metrics["score_threshold"]) == (list(context), threshold)
    assert "has 1 images that are not in the test split" in capsys.readouterr().out

    for name in order:
        rows = queries[{"all": "TestG50"}.get(name, name.capitalize() if name[0] != "T" else name)]
        literal = []
        for (photo, box), _, gallery in rows:
            listed = [photo, *(image for image, _ in gallery)]
            rest = [(image, None) for image in people if image not in listed]
            literal.append((photo, box, gallery + rest if name == "all" else gallery))
        mean, top, aps, ranked = oracle.search_cuhk(literal, found, threshold, context or None)
        ours = metrics["search"][name]
        assert abs(ours["mAP"] - mean) <= 1e-9
        for k in (1, 5, 10):
            assert abs(ours[f"top{k}"] - top[k]) <= 1e-9
        with (results / "queries.csv").open() as file:
            lines = [line for line in csv.DictReader(file) if line["protocol"] == name]
        assert sorted(int(line["query"]) for line in lines) == list(range(len(rows)))
        failed = [line["first_hit"] != "1" for line in lines]
        assert failed == sorted(failed, reverse=True)
        for line in lines:
            query = int(line["query"])
            hits = np.flatnonzero(ranked[query])
            assert line["first_hit"] == (str(hits[0] + 1) if hits.size else "")
            assert abs(float(line["AP"]) - aps[query]) < 1e-6
            assert int(line["matches"]) == hits.size
            (photo, _), _, gallery = rows[query]
            assert line["image"] == photo
            assert line["detected"] == ("yes" if len(found[photo][1]) else "no")
            assert int(line["targets"]) == sum(box is not None for _, box in gallery)

    boxes = {name: np.array(list(held.values())).reshape(-1, 4) for name, held in people.items()}
    recall, ap = oracle.detection(boxes, found, threshold)
    assert metrics["detection"] == pytest.approx({"recall": recall, "AP": ap}, abs=1e-9)
    assert metrics["detection_labeled"]["recall"] >= 0


def test_the_best_wrong_result_is_the_first_wrong_one_of_the_ranking(cuhk, tmp_path):
    root, _, found, _ = cuhk
    scorer = make_scorer(config_for(root, protocols=("TestG100",)))
    detections = load_detections(save(tmp_path / "d.npz", found, names=scorer.annotations.names))
    search = scorer.score(detections, None).searches["TestG100"]
    for query in range(len(search.outcomes)):
        ranking = scorer.rank(detections, query)
        wrong = np.flatnonzero(~ranking.is_match)
        outcome = search.outcomes[query]
        assert (outcome.wrong_row is not None) == bool(wrong.size)
        if wrong.size:
            assert outcome.wrong_row == ranking.row[wrong[0]]
            assert outcome.wrong_similarity == ranking.similarity[wrong[0]]


def test_a_table_of_zeros_says_that_nothing_reached_the_threshold(cuhk, tmp_path, capsys):
    root, _, found, _ = cuhk
    file = save(tmp_path / "d.npz", found)
    for threshold, said in ((0.6, False), (1.0, True)):
        evaluate_detections(config_for(root, score_threshold=threshold), file, tmp_path / "out")
        assert ("nothing reached the score threshold 1 " in capsys.readouterr().out) == said


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_one_line(cuhk, tmp_path):
    root, _, found, _ = cuhk
    file = save(tmp_path / "d.npz", found)
    part = {name: found[name] for name in list(found)[:20]}
    other = save(tmp_path / "other.npz", {f"x{name}": parts for name, parts in part.items()})
    part = save(tmp_path / "part.npz", part)
    cases = [
        (part, {}, r"part\.npz: lacks 4 of the 24 test images, the first is 's20\.jpg'"),
        (
            other,
            {},
            r"lacks 24 of the 24 .* first is 's0\.jpg'; its own 20 begin with .*'xs0\.jpg'",
        ),
        (file, {"boxes": "ground_truth"}, r"config\.eval\.boxes: found 'ground_truth'"),
        (file, {"protocols": ("TestG10",)}, r"eval\.protocols: found 'TestG10', expected one of"),
    ]
    for path, evaluation, message in cases:
        with pytest.raises(UserError, match=message) as error:
            evaluate_detections(config_for(root, **evaluation), path)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "other.npz", "part.npz"]
    scorer = make_scorer(config_for(root, protocols=("TestG50",)))
    nobody = dataclasses.replace(scorer.protocols[0], query_image=np.zeros(0, int))
    with pytest.raises(UserError, match="protocol TestG50: found no queries"):
        scorer_of(config_for(root), scorer.annotations, (nobody,))


def test_cross_camera_of_prw_against_the_literal_protocol(tmp_path):
    rng = np.random.default_rng(2)
    frames = {}
    for number in range(30):
        corner = rng.integers(0, 300, (4, 2))
        boxes = np.hstack([corner, corner + rng.integers((5, 10), (60, 150), (4, 2))])
        chosen = rng.choice(8, rng.integers(0, 5), replace=False).tolist()
        frames[f"c{rng.integers(1, 4)}s1_{number:06}"] = dict(zip(chosen, boxes, strict=False))
    rows = {n: [(i, *xywh(box)) for i, box in people.items()] for n, people in frames.items()}
    cameras = {
        person: {name[1] for name, people in frames.items() if person in people}
        for person in range(8)
    }
    queries = [
        (name, person, box)
        for name, people in frames.items()
        for person, box in people.items()
        if len(cameras[person]) > 1
    ]
    asked = [(person, *xywh(box), name) for name, person, box in queries]
    fixtures.write_prw(tmp_path, {"c1s1_999999": [(1, 2, 3, 4, 5)]}, rows, asked)
    found = {f"{name}.jpg": detect(rng, people, tied=False) for name, people in frames.items()}
    config = config_for(tmp_path)
    config.data.name = "prw"
    evaluate_detections(config, save(tmp_path / "d.npz", found))
    metrics = json.loads((tmp_path / "d_rescored" / "metrics.json").read_text())
    literal = {f"{name}.jpg": (name[1], people) for name, people in frames.items()}
    photos = [(f"{name}.jpg", person, box) for name, person, box in queries]
    for protocol, cross_camera in (("all", False), ("cross_camera", True)):
        mean, top, _, _ = oracle.search_prw(literal, photos, found, 0.2, cross_camera)
        assert abs(metrics["search"][protocol]["mAP"] - mean) <= 1e-9
        assert abs(metrics["search"][protocol]["top1"] - top[1]) <= 1e-9
