"""Saved detections against the literal protocols, over miniature folders without any photo."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.evaluation.scoring import evaluate_detections, make_scorer
from alignps_jax.types import UserError
from configs.cuhk import get_config
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.evaluation import metrics_oracles as oracle
from tests.evaluation.metrics_test import detect, lay_out, make_frames, xywh

FILES = ("TestG50", "TestG100", "TestG4000", "Occlusion", "Resolution")


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    """A folder with all kinds of protocols, its queries by file, and detections by image."""
    rng = np.random.default_rng(11)
    root = tmp_path_factory.mktemp("cuhk")
    people = {name: held for name, (_, held) in make_frames(rng, 24).items()}
    homes = {i: [name for name, held in people.items() if i in held] for i in range(12)}
    persons = [person for person, names in homes.items() if len(names) > 1]
    queries = {}
    for file, size in zip(FILES, (6, 12, 20, 8, 8), strict=True):
        rows = queries[file] = []
        for person in persons if file.startswith("Test") else persons[2:5]:
            first, *others = homes[person]
            gallery = [*others[:3], *rng.choice(list(people), size).tolist()]
            cells = [(name, xywh(people[name].get(person))) for name in gallery]
            rows.append(((first, xywh(people[first][person])), f"p{person}", cells))
    images = {name: [xywh(box) for box in held.values()] for name, held in people.items()}
    train = {"p99": [("t.jpg", (1, 2, 3, 4))]}
    fixtures.write_cuhk(root, images | {"t.jpg": [(1, 2, 3, 4)]}, list(people), train, queries)
    found = {name: detect(rng, held, tied=False) for name, held in people.items()}
    # A query photo without detections, a gallery image without any.
    for name in (queries["Occlusion"][0][0][0], list(people)[9]):
        found[name] = tuple(part[:0] for part in found[name])
    return root, queries, found, people


def config_for(root, **evaluation):
    config = get_config()
    config.data.root = str(root)
    config.eval.update(evaluation)
    return config


def save(path: Path, found, scale=1.0, names=None):
    """The file as another program may write it: other order, other scale, other dtypes."""
    arrays = dict(vars(lay_out(found, names)))
    arrays["image_names"] = np.array(arrays.pop("names"))
    arrays["embeddings"] = arrays["embeddings"].astype(np.float64) * scale
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("context", "threshold"), [((), 0.2), ((3, 2), 0.2), ((2, 4), 0.2), ((99, 1), 0.6)]
)
def test_every_protocol_of_a_folder_in_one_run(cuhk, tmp_path, context, threshold, capsys):
    root, queries, found, people = cuhk
    rng = np.random.default_rng(1)
    extra = {**found, "elsewhere.jpg": next(iter(found.values()))}
    names = rng.permutation(list(extra)).tolist()
    file = save(tmp_path / "mine.npz", extra, scale=7.5, names=names)
    order = ["TestG100", "TestG50", "TestG4000", "all", "occlusion", "resolution"]
    settings = {"context_matching": context, "score_threshold": threshold}
    evaluate_detections(config_for(root, protocols=tuple(order), **settings), file)
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


def test_a_table_of_zeros_says_that_nothing_reached_the_threshold(cuhk, tmp_path, capsys):
    root, _, found, _ = cuhk
    file = save(tmp_path / "d.npz", found)
    for threshold, said in ((0.6, False), (1.0, True)):
        evaluate_detections(config_for(root, score_threshold=threshold), file, tmp_path / "out")
        assert ("nothing reached the score threshold 1 " in capsys.readouterr().out) == said


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_one_line(cuhk, tmp_path):
    root, _, found, _ = cuhk
    file, first = save(tmp_path / "d.npz", found), next(iter(found))
    other = {f"x{name}": found[name] for name in list(found)[:20]}
    other = save(tmp_path / "other.npz", other)
    missing = rf"other\.npz: lacks 24 of the 24 .* first is '{first}'; its own 20 .*'x{first}'"
    for path, evaluation, message in (
        (other, {}, missing),
        (file, {"boxes": "ground_truth"}, r"config\.eval\.boxes: found 'ground_truth'"),
        (file, {"protocols": ("TestG10",)}, r"eval\.protocols: found 'TestG10', expected one of"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_detections(config_for(root, **evaluation), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "other.npz"]
    scorer = make_scorer(config_for(root, protocols=("TestG50",)))
    nobody = dataclasses.replace(scorer.protocols[0], query_image=np.zeros(0, int))
    with pytest.raises(UserError, match="protocol TestG50: found no queries"):
        dataclasses.replace(scorer, protocols=(nobody,))


def test_cross_camera_of_prw_against_the_literal_protocol(tmp_path):
    rng = np.random.default_rng(2)
    frames = make_frames(rng, 30)
    cameras = {i: {camera for camera, people in frames.values() if i in people} for i in range(12)}
    queries = [
        (name, person, box)
        for name, (_, people) in frames.items()
        for person, box in people.items()
        if len(cameras[person]) > 1
    ]
    rows = {
        name.removesuffix(".jpg"): [(person, *xywh(box)) for person, box in people.items()]
        for name, (_, people) in frames.items()
    }
    asked = [(i, *xywh(box), name.removesuffix(".jpg")) for name, i, box in queries]
    fixtures.write_prw(tmp_path, {"c1s1_999999": [(1, 2, 3, 4, 5)]}, rows, asked)
    found = {name: detect(rng, people, tied=False) for name, (_, people) in frames.items()}
    config = config_for(tmp_path)
    config.data.name = "prw"
    evaluate_detections(config, save(tmp_path / "d.npz", found))
    metrics = json.loads((tmp_path / "d_rescored" / "metrics.json").read_text())
    for protocol, cross_camera in (("all", False), ("cross_camera", True)):
        mean, top, _, _ = oracle.search_prw(frames, queries, found, 0.2, cross_camera)
        assert abs(metrics["search"][protocol]["mAP"] - mean) <= 1e-9
        assert abs(metrics["search"][protocol]["top1"] - top[1]) <= 1e-9
