"""Index, search, detect, export and forget, as they are typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import launch
from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.evaluation.calibration import LIMIT, NOBODY, Calibration
from alignps_jax.evaluation.detections_io import load_detections
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.groups import Groups
from tests.gallery.networks import (
    network_config,
    photo,
    write_checkpoint,
    write_photos,
    write_video,
)
from tests.places import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"), network_config())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, ["a.jpg", "b.png", "deep/c1s1_000151.jpg", "2024-03-09/d.jpg"])
    write_video(folder / "v.mp4", [photo(seed) for seed in range(8)], rate=4)
    (folder / "bad.jpg").write_bytes(b"no photo")
    (folder / "raw.cr3").touch()
    return folder


@pytest.fixture(scope="module")
def gallery(run, photos, tmp_path_factory):
    address = tmp_path_factory.mktemp("gallery") / "people.lance"
    assert launched(index=None, checkpoint=run, gallery=address, source=photos) == 3
    return address


def launched(*switches, **flags):
    (mode, _), *others = flags.items()
    words = [
        f"--{name}={value}"
        for name, values in others
        for value in (values if isinstance(values, list) else [values])
    ]
    return launch.main(["launch.py", f"--mode={mode}", *words, *switches])


def test_index_again_passes_over_what_is_known(run, photos, gallery, capsys):
    assert launched(index=None, checkpoint=run, gallery=gallery, source=photos) == 3
    printed = capsys.readouterr()
    assert "found 0 people in 0 photos and frames; 5 of 6 files" in printed.out
    assert "not looked at: 1 .cr3" in printed.out
    assert re.search(r"^skipped .*bad\.jpg: cannot be decoded", printed.out, re.M)
    (error,) = printed.err.splitlines()[-1:]
    assert error == "error: files skipped: 1 (listed above)"


@pytest.mark.parametrize("place", ["gallery", "folder"])
def test_search(run, photos, gallery, tmp_path, capsys, place):
    """A folder is searched as a gallery is, with all below it, videos too."""
    where = gallery if place == "gallery" else photos
    flags = {"checkpoint": run, "query": photos / "a.jpg", "gallery": where, "workdir": tmp_path}
    assert launched(search=None, **flags) == (0 if place == "gallery" else 3)
    assert "people in 6 scenes" in capsys.readouterr().out
    rankings = json.loads((tmp_path / "ranking.json").read_text())
    opened = Gallery.open(gallery)
    own = {scene.path: scene for card in opened.memory().cards(9) for scene in [card.scene]}
    assert rankings
    for ranking in rankings:
        similarities = [result["similarity"] for result in ranking["results"]]
        assert similarities == sorted(similarities, reverse=True)
        others = len(opened.memory()) - len(
            opened.memory().people_of(own[str(photos / "a.jpg")].id)
        )
        assert len(ranking["results"]) == others > 0
        for result in ranking["results"]:
            person = opened.memory().person(result["person"])
            assert result["image"] == person.scene.path != str(photos / "a.jpg")
            assert result.get("second") == person.scene.second
            np.testing.assert_allclose(result["box"], person.box, atol=0.01)
    assert (tmp_path / "ranking.png").is_file()


@pytest.mark.parametrize(
    ("filters", "name"),
    [
        ({"folder": "deep"}, "deep/c1s1_000151.jpg"),
        ({"camera": ["c1", "other"]}, "deep/c1s1_000151.jpg"),
        ({"after": "2024-03-09", "before": "2024-03-09"}, "2024-03-09/d.jpg"),
        ({"kind": "video", "count": 3}, "v.mp4"),
    ],
)
def test_search_with_filters(run, photos, gallery, tmp_path, monkeypatch, filters, name):
    monkeypatch.chdir(photos)
    flags = {"checkpoint": run, "query": photos / "a.jpg", "gallery": gallery, "workdir": tmp_path}
    assert launched(search=None, **flags, **filters) == 0
    (first, *_) = json.loads((tmp_path / "ranking.json").read_text())
    opened = Gallery.open(gallery)
    cards = [card for card in opened.memory().cards(9) if card.scene.path == str(photos / name)]
    scenes = opened.memory().scenes_of(cards[0].scene.hash)
    expected = {person.id for scene in scenes for person in opened.memory().people_of(scene.id)}
    found = {result["person"] for result in first["results"]}
    assert found <= expected
    assert len(found) == min(len(expected), filters.get("count", 1000)) > 0


def calibrated(run, folder, *probability):
    """A copy of a checkpoint with a curve for similarities from -1 to 1."""
    run = Path(shutil.copytree(run, folder))
    similarity, counts = np.linspace(-1, 1, 41), [1] * 41
    known = np.interp(similarity, np.linspace(-1, 1, len(probability)), probability)
    curves = [known.tolist()] * 2
    curve = Calibration("some", 999.0, similarity.tolist(), *curves, counts, counts)
    curve.save(chosen_step(run)[0])
    return run, curve


def test_results_end_where_they_are_not_likely(run, photos, gallery, tmp_path, capsys):
    flags = {"query": photos / "a.jpg", "gallery": gallery, "workdir": tmp_path}
    assert launched(search=None, checkpoint=run, **flags) == 0
    assert "not calibrated" in capsys.readouterr().out
    own, curve = calibrated(run, tmp_path / "own", 0.0, 0.0, 0.9)
    found = {}
    for switch in ("--json", "--show_all"):
        assert launched("--json", switch, search=None, checkpoint=own, **flags) == 0
        printed = capsys.readouterr()
        content = json.loads(printed.out)
        assert content == json.loads((tmp_path / "ranking.json").read_text())
        assert printed.err.count(" found, first ") == sum(bool(one["results"]) for one in content)
        results = [result for one in content for result in one["results"]]
        found[switch] = np.array([result["probability"] for result in results])
        for one in content:
            similarity, probability = (
                np.array([result[name] for result in one["results"]])
                for name in ("similarity", "probability")
            )
            np.testing.assert_allclose(probability, curve.results(similarity, 9), atol=1e-5)
    expected = found["--show_all"][found["--show_all"] >= LIMIT]
    assert 0 < len(expected) < len(found["--show_all"])
    np.testing.assert_array_equal(found["--json"], expected)
    nobody, _ = calibrated(run, tmp_path / "nobody", 0.0, 0.001)
    assert launched(search=None, checkpoint=nobody, **flags) == 0
    assert NOBODY in capsys.readouterr().out
    assert not any(one["results"] for one in json.loads((tmp_path / "ranking.json").read_text()))


def test_group(run, photos, gallery, tmp_path, capsys):
    flags = {"gallery": gallery, "workdir": tmp_path}
    assert launched(group=None, checkpoint=run, **flags) == 2
    assert "not calibrated" in capsys.readouterr().err
    own, _ = calibrated(run, tmp_path / "own", 0.1, 0.2, 0.9)
    assert launched("--json", "--across_days", group=None, checkpoint=own, **flags) == 0
    groups = json.loads(capsys.readouterr().out)
    assert groups == json.loads((tmp_path / "groups.json").read_text())
    opened = Gallery.open(gallery)
    for group in groups:
        people = [opened.memory().person(one["person"]) for one in group["people"]]
        assert len({person.scene.id for person in people}) == len(people) > 1
        assert [one["image"] for one in group["people"]] == [one.scene.path for one in people]
    assert [one.id for one in Groups(opened.people).all()] == [one["id"] for one in groups] != []


def test_search_in_a_box(run, photos, gallery, tmp_path):
    flags = {"checkpoint": run, "query": photos / "a.jpg", "gallery": gallery, "workdir": tmp_path}
    opened = Gallery.open(gallery)
    scene = next(c.scene for c in opened.memory().cards(9) if c.scene.path == str(photos / "a.jpg"))
    box = ",".join(f"{x:.1f}" for x in opened.memory().people_of(scene.id)[0].box)
    assert launched(search=None, **flags, box=box) == 0
    (only,) = json.loads((tmp_path / "ranking.json").read_text())
    np.testing.assert_allclose(only["query"]["box"], np.array(box.split(","), float), atol=0.1)


def test_detect_finds_who_is_in_a_gallery(run, photos, gallery, tmp_path, capsys):
    target = tmp_path / "people.npz"
    assert launched(detect=None, checkpoint=run, source=photos, target=target) == 3
    assert "bad.jpg: cannot be decoded" in capsys.readouterr().out
    saved, opened = load_detections(target), Gallery.open(gallery)
    scenes = {}
    for card in opened.memory().cards(10):
        for scene in opened.memory().scenes_of(card.scene.hash):
            name = str(Path(scene.path).relative_to(photos))
            scenes[name if scene.second is None else f"{name}#t={scene.second:.3f}"] = scene
    assert set(saved.names) == set(scenes)
    for row, name in enumerate(saved.names):
        people = opened.memory().people_of(scenes[name].id)
        expected = {
            "boxes": np.array([person.box for person in people]).reshape(-1, 4),
            "scores": [person.score for person in people],
            "embeddings": opened.embeddings([person.id for person in people]),
        }
        for field, values in expected.items():
            np.testing.assert_allclose(getattr(saved, field)[saved.of(row)], values, atol=1e-5)


def test_export_and_forget(gallery, photos, tmp_path, capsys):
    assert launched(export=None, gallery=gallery, target=tmp_path / "people.parquet") == 0
    assert (tmp_path / "people.parquet").stat().st_size > 1000
    assert launched(export=None, gallery=gallery, target=tmp_path / "people.pth") == 2
    opened = Gallery.open(gallery)
    photo_ = next(
        c.scene for c in opened.memory().cards(9) if opened.memory().people_of(c.scene.id)
    )
    people = [person.id for person in opened.memory().people_of(photo_.id)]
    assert launched(forget=None, gallery=gallery, person=people[:2], photo=[photos / "v.mp4"]) == 0
    printed = capsys.readouterr().out
    assert "people of" in printed
    assert "not reached: pictures and rankings of searches, exports, backups" in printed
    assert launched(forget=None, gallery=gallery, person=people[:1]) == 2
    assert launched(forget=None, gallery=gallery) == 2


def test_what_cannot_be_is_one_line(run, photos, gallery, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", network_config(), seed=1)
    empty, bad, query = (tmp_path / name for name in ("empty", "bad", "query.png"))
    for file in (empty / "notes.txt", bad / "bad.jpg", query):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    search = {"checkpoint": run, "query": photos / "a.jpg", "workdir": tmp_path / "out"}
    fill = {"checkpoint": run, "gallery": tmp_path / "people.lance", "source": photos}
    both = rf"found .*{other}, step 7.*expected .*{run}, step 7"
    for mode, flags, change, code, message in (
        ("search", search, {"gallery": empty}, 2, "found no photo or video"),
        ("search", search, {"gallery": bad}, 3, "files skipped: 1"),
        ("search", search, {"gallery": tmp_path / "nothing"}, 2, "--source: found "),
        ("search", search, {"gallery": gallery, "query": query}, 2, "query.png: "),
        ("search", search, {"gallery": gallery, "checkpoint": other}, 2, both),
        (
            "search",
            search,
            {"gallery": gallery, "box": "500,500,600,600"},
            2,
            "nobody was found at 5",
        ),
        (
            "search",
            search,
            {"gallery": gallery, "box": "9,9,3,3"},
            2,
            "nobody was found at 9,9,3,3",
        ),
        ("search", search, {"gallery": gallery, "box": "1,2,3"}, 2, "--box: found '1,2,3'"),
        ("index", fill, {"gallery": gallery, "checkpoint": other}, 2, both),
        ("index", fill, {"every": "often"}, 2, "--every: found 'often', expected a time: 1s"),
        ("index", fill, {"every": "0s"}, 2, "--every: found '0s'"),
        ("index", fill, {"source": tmp_path / "no"}, 2, "--source: found "),
        ("index", fill, {"gallery": photos}, 2, "expected a gallery"),
    ):
        assert launched(**{mode: None, **flags, **change}) == code
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_what_is_missing():
    """Training does without, and everything else says so at once."""
    code = (
        "import sys; sys.modules['lancedb'] = sys.modules['pyarrow'] = None\n"
        "import launch; import alignps_jax.training.train\n"
        "for mode in ('--mode=index --checkpoint=x --source=y', '--mode=forget --photo=x'):\n"
        "    assert launch.main(['launch.py', *mode.split(), '--gallery=people.lance']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"error: found no package \w+: run make setup in the project ", line)
        assert "'.[gallery]'" in line
