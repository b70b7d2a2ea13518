"""A search survives its gallery: what cannot be read is skipped, listed, and told by exit code."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

import launch
from alignps_jax.files import write_image
from alignps_jax.gallery.photos import GalleryReader, gallery_photos
from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError
from configs import tiny
from tests.drawing.pictures_test import gray
from tests.figures.kinds_test import PEOPLE, FakeDetector


class Finder(FakeDetector):
    step = 7


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkpoint that is a configuration, whose network finds people in photos of one size."""
    config = tiny.get_config()
    config.data.max_pixels = 100_000
    manifest = tmp_path / "run" / "checkpoints" / "7" / "manifest" / "metadata"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"config": json.loads(config.to_json()), "arrays": {}}))
    monkeypatch.setattr(Detector, "from_checkpoint", lambda path, config=None: Finder(PEOPLE))
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    """A query, and a gallery of three good photos."""
    for name in ("query.png", "gallery/a.png", "gallery/b.png", "gallery/d.jpg"):
        write_image(tmp_path / name, gray(160, 240))
    return tmp_path / "gallery"


def search(run, gallery, query=None):
    query = query or gallery.parent / "query.png"
    flags = ["--mode=search", f"--checkpoint={run}", f"--query={query}", f"--gallery={gallery}"]
    return launch.main(["launch.py", *flags])


def found_photos(run):
    rankings = json.loads((run / "search" / "query" / "ranking.json").read_text())
    return {result["image"] for ranking in rankings for result in ranking["results"]}


def test_what_cannot_be_read_is_skipped_and_listed(run, photos, capsys):
    assert search(run, photos) == 0
    assert found_photos(run) == {"a.png", "b.png", "d.jpg"}
    assert "skipped" not in capsys.readouterr().out
    whole = (photos / "d.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    (photos / "text.webp").write_text("not a photo")
    (photos / "folder.jpg").mkdir()
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "circle.jpg").symlink_to("circle.jpg")
    write_image(photos / "huge.png", gray(500, 500))
    os.mkfifo(photos / "pipe.jpg")
    assert search(run, photos) == 3
    assert found_photos(run) == {"a.png", "b.png", "d.jpg"}
    assert (run / "search" / "query" / "ranking.png").is_file()
    printed = capsys.readouterr()
    assert "among 6 people (scores >= 0.2) in 3 photos" in printed.out
    reasons = {
        "circle.jpg": "cannot be read (",
        "cut.jpg": "truncated JPEG",
        "empty.png": "cannot be decoded (0 bytes)",
        "folder.jpg": "cannot be read (Is a directory)",
        "gone.jpg": "cannot be read (No such file or directory)",
        "huge.png": "has 500x500 pixels; expected at most 100,000",
        "pipe.jpg": "is no file",
        "text.webp": "cannot be decoded",
    }
    lines = printed.out.split("skipped:\n")[1].splitlines()
    assert len(lines) == len(reasons)
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"  {photos / name}: {reason}")
    (error,) = printed.err.splitlines()[-1:]
    assert error == (
        "error: --gallery: skipped 8 of 11 photos, which are listed above; the results are "
        "complete without them"
    )


def test_a_gallery_without_a_good_photo_is_an_error(run, photos, capsys):
    for path in photos.iterdir():
        path.write_bytes(b"")
    assert search(run, photos) == 2
    assert not (run / "search").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --gallery: found no photo that can be read among 3, expected")
    assert f"{photos / 'a.png'}: cannot be decoded" in error


def test_a_damaged_query_is_an_error(run, photos, capsys):
    (photos.parent / "query.png").write_bytes(b"no photo")
    assert search(run, photos) == 2
    assert f"error: {photos.parent / 'query.png'}: cannot be decoded" in capsys.readouterr().err
    assert not (run / "search").exists()


def test_names_that_are_no_text_are_found_and_printed(run, photos, capsys):
    sys.stdout.reconfigure(errors="backslashreplace")  # as it is on the command line
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        write_image(photos / name, gray(160, 240))
        (photos / os.fsdecode(b"\xfd.jpg")).touch()
    except UserError:
        pytest.skip("this file system has text as names only")
    for path in ("a.png", "b.png", "d.jpg"):
        (photos / path).unlink()
    assert search(run, photos) == 3
    assert found_photos(run) == {name}
    printed = capsys.readouterr().out
    assert r"best match \udcff\udcfe.png" in printed
    assert r"gallery/\udcfd.jpg: cannot be decoded" in printed


def test_the_gallery_is_a_folder_of_photos_without_the_query(photos, tmp_path):
    (photos / "notes.txt").touch()
    (photos / "same.png").symlink_to(tmp_path / "query.png")
    names = [path.name for path in gallery_photos(photos, tmp_path / "query.png")]
    assert names == ["a.png", "b.png", "d.jpg"]
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", r"no photos in \S+empty, expected \.jpg, .* files besides the query"),
        ("nothing", r"nothing, which cannot be read \(No such file or directory\)"),
        ("query.png", r"query\.png, which cannot be read \(Not a directory\)"),
    ):
        with pytest.raises(UserError, match=rf"^--gallery: found \S*{message}"):
            gallery_photos(tmp_path / folder, tmp_path / "query.png")


def test_the_photos_of_several_passes_are_counted_once(photos):
    reader = GalleryReader()
    (photos / "b.png").write_bytes(b"")
    paths = sorted(photos.iterdir())
    for _ in range(2):
        read = list(reader.read(paths, 10**6))
        assert [path.name for path, _ in read] == ["a.png", "d.jpg"]
        assert all(np.array_equal(image.shape, (160, 240, 3)) for _, image in read)
    with pytest.raises(UserError, match=r"^--gallery: skipped 1 of 3 photos"):
        reader.finish()
    assert list(reader.read([], 10**6)) == []
    GalleryReader().finish()
