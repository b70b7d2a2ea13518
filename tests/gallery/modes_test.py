"""Index, search, detect, export and forget, as they are typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import launch
from alignps_jax.evaluation.detections_io import load_detections
from alignps_jax.gallery.store import Gallery
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
    write_photos(folder, ["a.jpg", "b.png", "deep/c1s1_000151.jpg"])
    write_video(folder / "v.mp4", [photo(seed) for seed in range(8)], rate=4)
    (folder / "bad.jpg").write_bytes(b"no photo")
    return folder


@pytest.fixture(scope="module")
def gallery(run, photos, tmp_path_factory):
    address = tmp_path_factory.mktemp("gallery") / "people.lance"
    assert launched(index=None, checkpoint=run, gallery=address, source=photos) == 3
    return address


def launched(**flags):
    (mode, _), *others = flags.items()
    words = [f"--{name}={value}" for name, value in others]
    return launch.main(["launch.py", f"--mode={mode}", *words])


def test_index_again_passes_over_what_is_known(run, photos, gallery, capsys):
    assert launched(index=None, checkpoint=run, gallery=gallery, source=photos) == 3
    printed = capsys.readouterr()
    assert "found 0 people (scores >= 0.285) in 0 photos and frames; 4 of 5 files" in printed.out
    assert "bad.jpg: cannot be decoded (8 bytes)" in printed.out.split("skipped:\n")[1]
    (error,) = printed.err.splitlines()[-1:]
    assert error.startswith("error: --source: skipped 1 of 5 files")


def test_search_in_a_gallery(run, photos, gallery, tmp_path, capsys):
    flags = {"checkpoint": run, "query": photos / "a.jpg", "gallery": gallery, "workdir": tmp_path}
    assert launched(search=None, **flags) == 0
    assert "people in 5 scenes of" in capsys.readouterr().out
    rankings = json.loads((tmp_path / "ranking.json").read_text())
    opened = Gallery.open(gallery)
    for ranking in rankings:
        similarities = [result["similarity"] for result in ranking["results"]]
        assert similarities == sorted(similarities, reverse=True)
        own = sum(scene.path == str(photos / "a.jpg") for scene in opened.scenes(10))
        assert own == 1
        for result in ranking["results"]:
            person = opened.person(result["person"])
            assert result["image"] == person.scene.path != str(photos / "a.jpg")
            assert result.get("second") == person.scene.second
            np.testing.assert_allclose(result["box"], person.box, atol=0.01)
    assert (tmp_path / "ranking.png").is_file()


def test_another_checkpoint_is_an_error_that_names_both(run, photos, gallery, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", network_config(), seed=1)
    flags = {"gallery": gallery, "workdir": tmp_path / "out"}
    assert launched(search=None, checkpoint=other, query=photos / "a.jpg", **flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"({run}, step 7)" in error
    assert f"({other}, step 7)" in error
    assert launched(index=None, checkpoint=other, gallery=gallery, source=photos) == 2


def test_detect_finds_who_is_in_a_gallery(run, photos, gallery, tmp_path, capsys):
    target = tmp_path / "people.npz"
    assert launched(detect=None, checkpoint=run, source=photos, target=target) == 3
    assert "bad.jpg: cannot be decoded (8 bytes)" in capsys.readouterr().out
    saved, opened = load_detections(target), Gallery.open(gallery)
    scenes = {}
    for scene in opened.scenes(10):
        name = str(Path(scene.path).relative_to(photos))
        scenes[name if scene.second is None else f"{name}#t={scene.second:.3f}"] = scene
    assert set(saved.names) == set(scenes)
    for row, name in enumerate(saved.names):
        people = opened.people(scenes[name].id)
        expected = {
            "boxes": np.array([person.box for person in people]).reshape(-1, 4),
            "scores": [person.score for person in people],
            "embeddings": opened.embeddings([person.id for person in people]),
        }
        for field, values in expected.items():
            np.testing.assert_allclose(getattr(saved, field)[saved.of(row)], values, atol=1e-5)


def test_export_and_forget(gallery, photos, tmp_path, capsys):
    for name in ("people.parquet", "people.arrow"):
        assert launched(export=None, gallery=gallery, target=tmp_path / name) == 0
        assert (tmp_path / name).stat().st_size > 1000
    assert launched(export=None, gallery=gallery, target=tmp_path / "people.pth") == 2
    person = Gallery.open(gallery).people(Gallery.open(gallery).scenes(1)[0].id)[0]
    assert launched(forget=None, gallery=gallery, person=person.id) == 0
    assert launched(forget=None, gallery=gallery, photo=photos / "v.mp4") == 0
    assert "people of" in capsys.readouterr().out
    assert Gallery.open(gallery).num_scenes == 3
    assert launched(forget=None, gallery=gallery, person=person.id) == 2


def test_wrong_flags_are_one_line(run, photos, tmp_path, capsys):
    address = tmp_path / "people.lance"
    flags = {"checkpoint": run, "gallery": address, "source": photos}
    for change, message in (
        ({"every": "often"}, "--every: found 'often', expected a time such as 1s"),
        ({"every": "0s"}, "--every: found '0s'"),
        ({"source": tmp_path / "no"}, "--source: found no"),
        ({"source": run / "checkpoints" / "7" / "model" / "x"}, "--source: found no"),
        ({"gallery": photos}, "expected a gallery or an empty folder"),
    ):
        assert launched(index=None, **{**flags, **change}) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


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
