"""Saved detections against the literal protocols, over miniature folders without any photo."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.evaluation.calibration import load
from alignps_jax.evaluation.scoring import evaluate_detections, make_scorer
from alignps_jax.types import UserError
from configs.cuhk import get_config
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.evaluation import metrics_oracles as oracle
from tests.evaluation.metrics_test import detect, lay_out, make_frames

# Strangers in a gallery, by protocol.
STRANGERS = {"TestG50": 6, "TestG100": 12, "TestG4000": 20, "occlusion": 8, "resolution": 8}
CORNERS = ("x1", "y1", "x2", "y2")


def xywh(box):
    return None if box is None else [*box[:2], *(box[2:] - box[:2])]


def percent(value):
    return f"{100 * value:.1f}"


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    """A folder with all kinds of protocols, its queries by protocol, and detections by image."""
    rng = np.random.default_rng(11)
    root = tmp_path_factory.mktemp("cuhk")
    people = {name: held for name, (_, held) in make_frames(rng, 24).items()}
    homes = {i: [name for name, held in people.items() if i in held] for i in range(12)}
    persons = [person for person, names in homes.items() if len(names) > 1]
    queries, files = {}, {}
    for protocol, size in STRANGERS.items():
        rows = queries[protocol] = []
        for person in persons if protocol.startswith("Test") else persons[2:5]:
            first, *others = homes[person]
            names = [*others[:3], *rng.choice(list(people), size).tolist()]
            gallery = [(name, people[name].get(person)) for name in names]
            rows.append((first, people[first][person], gallery))
        files[protocol[0].upper() + protocol[1:]] = [
            ((photo, xywh(box)), f"p{number}", [(name, xywh(b)) for name, b in gallery])
            for number, (photo, box, gallery) in enumerate(rows)
        ]
    queries["all"] = [
        (photo, box, gallery + [(n, None) for n in people if n not in (photo, *dict(gallery))])
        for photo, box, gallery in queries["TestG50"]
    ]
    images = {name: [xywh(box) for box in held.values()] for name, held in people.items()}
    train = {"p99": [("t.jpg", (1, 2, 3, 4))]}
    fixtures.write_cuhk(root, images | {"t.jpg": [(1, 2, 3, 4)]}, list(people), train, files)
    found = {name: detect(rng, held, tied=False) for name, held in people.items()}
    # A query photo without detections, a gallery image without any.
    for name in (queries["occlusion"][0][0], list(people)[9]):
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
    ("context", "threshold"), [((), 0.2), ((), 1.0), ((3, 2), 0.2), ((2, 4), 0.2), ((99, 1), 0.6)]
)
def test_every_protocol_of_a_folder_in_one_run(
    cuhk, tmp_path, context, threshold, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal; the table is for a pipe, as wide as it is
    root, queries, found, people = cuhk
    rng = np.random.default_rng(1)
    extra = {**found, "elsewhere.jpg": next(iter(found.values()))}
    names = rng.permutation(list(extra)).tolist()
    file = save(tmp_path / "mine.npz", extra, scale=7.5, names=names)
    order = rng.permutation(list(queries)).tolist()
    settings = {"context_matching": context, "score_threshold": threshold}
    evaluate_detections(config_for(root, protocols=tuple(order), **settings), file)
    results = tmp_path / "mine_rescored"
    metrics = json.loads((results / "metrics.json").read_text())
    assert list(metrics["search"]) == order
    assert metrics == metrics | {
        "dataset": "cuhk_sysu",
        "checkpoint_step": None,
        "checkpoint_chosen_by": None,
        "score_threshold": threshold,
        "boxes": "detected",
        "context_matching": list(context),
    }
    said, table = capsys.readouterr().out.split("; metrics in percent\n")
    assert "has 1 images that are not in the test split" in said
    matching = f"context matching {context[0]}, {context[1]}, " if context else ""
    assert said.endswith(f"\ncuhk_sysu, {matching}scores >= {threshold:g}")
    assert ("nothing reached the score threshold 1 " in table) == (threshold == 1)
    table = table.split("\nnote: ")[0].split("\nmetrics ")[0].splitlines()
    assert max(map(len, table)) <= 80
    detected = [*metrics["detection"].values(), *metrics["detection_labeled"].values()]
    cells = [line.split() for line in table]
    assert ["saved", *map(percent, detected)] in [line[:5] for line in cells]
    with (results / "queries.csv").open() as csv_file:
        every_line = list(csv.DictReader(csv_file))

    calibration = load(results)
    assert (calibration is None) == bool(context or threshold == 1)  # no result
    if calibration:
        truths = oracle.search(queries[order[0]], found, threshold)[3]
        assert calibration.dataset == f"cuhk_sysu, {order[0]}"
        assert sum(calibration.right) == sum(truth.sum() for truth in truths)
        assert sum(calibration.right + calibration.wrong) == sum(map(len, truths))
    for name in order:
        mean, top, aps, ranked = oracle.search(queries[name], found, threshold, context or None)
        expected = {"mAP": mean, **{f"top{k}": value for k, value in top.items()}}
        assert metrics["search"][name] == pytest.approx(expected, abs=1e-9)
        shown = [name, *map(percent, metrics["search"][name].values())]
        assert shown in [line[-5:] for line in cells]
        lines = [line for line in every_line if line["protocol"] == name]
        assert sorted(int(line["query"]) for line in lines) == list(range(len(queries[name])))
        failed = [line["first_hit"] != "1" for line in lines]
        assert failed == sorted(failed, reverse=True)
        for line in lines:
            query = int(line["query"])
            photo, box, gallery = queries[name][query]
            hits = np.flatnonzero(ranked[query])
            assert line["first_hit"] == (str(hits[0] + 1) if hits.size else "")
            assert abs(float(line["AP"]) - aps[query]) < 1e-6
            assert int(line["matches"]) == hits.size
            assert line["image"] == photo
            assert [float(line[side]) for side in CORNERS] == box.tolist()
            assert line["detected"] == ("yes" if len(found[photo][1]) else "no")
            assert int(line["targets"]) == sum(box is not None for _, box in gallery)
            assert bool(line["wrong_image"]) == bool((ranked[query] == 0).any())
            if line["wrong_image"]:
                boxes, _, embeddings = found[line["wrong_image"]]
                wrong = [float(line[f"wrong_{side}"]) for side in CORNERS]
                row = np.abs(boxes - wrong).max(axis=1).argmin()
                np.testing.assert_allclose(boxes[row], wrong, atol=6e-3)
                cosine = embeddings[row] @ oracle.query_embedding(found[photo], box)
                assert context or abs(cosine - float(line["wrong_similarity"])) < 1e-5

    boxes = {name: np.array(list(held.values())).reshape(-1, 4) for name, held in people.items()}
    recall, ap = oracle.detection(boxes, found, threshold)
    assert metrics["detection"] == pytest.approx({"recall": recall, "AP": ap}, abs=1e-9)


def test_a_checkpoint_gets_its_calibration_and_one_that_is_read_only_a_note(cuhk, tmp_path, capsys):
    root, _, found, _ = cuhk
    scorer = make_scorer(config_for(root))
    measured = scorer.score(lay_out(found, scorer.annotations.names), 7)
    for folder, notes in ((tmp_path / "own", 0), (Path("/proc/no"), 1)):
        scorer.write(tmp_path, dataclasses.replace(measured, folder=folder))
        assert capsys.readouterr().out.count("note: searches") == notes
    assert (own := load(tmp_path / "own"))
    assert own == load(tmp_path) == scorer.calibration(measured)
    for changed in ({"boxes": "ground_truth"}, {"context_matching": (3, 2)}):
        assert make_scorer(config_for(root, **changed)).calibration(measured) is None


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
    galleries = {"all": [], "cross_camera": []}
    for photo, person, box in queries:
        others = [(name, held.get(person)) for name, (_, held) in frames.items() if name != photo]
        galleries["all"].append((photo, box, others))
        own = f"c{frames[photo][0]}"
        others = [entry for entry in others if not entry[0].startswith(own)]
        galleries["cross_camera"].append((photo, box, others))
    for protocol, asked in galleries.items():
        mean, top, _, _ = oracle.search(asked, found, 0.2)
        expected = {"mAP": mean, **{f"top{k}": value for k, value in top.items()}}
        assert metrics["search"][protocol] == pytest.approx(expected, abs=1e-9)
