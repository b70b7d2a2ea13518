"""What is found in folders, and what is known of a file: capture time, camera, orientation."""

from __future__ import annotations

import datetime
import os

import numpy as np
import PIL.Image
import pytest

from alignps_jax.gallery.reading import read_scene
from alignps_jax.gallery.sources import MediaFile, media_files, origin, parse_every
from alignps_jax.types import UserError
from tests.gallery.networks import photo, write_photos

TIME = datetime.datetime(2024, 1, 31, 14, 25, 30)


def save(path, **tags):
    """A photo with EXIF data."""
    image = PIL.Image.fromarray(photo(0))
    exif = image.getexif()
    for tag, value in tags.items():
        exif[int(tag.removeprefix("t"), 16)] = value
    if taken := exif.pop(0x9003, None):
        exif.get_ifd(0x8769)[0x9003] = taken
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, quality=95)
    return MediaFile(str(path), path.stat().st_size, path.stat().st_mtime_ns)


def scene(file):
    read = read_scene(file, 10**6)
    assert read.error is None
    return read.tag.scene, read.image


def test_exif_comes_before_folder_and_name(tmp_path):
    file = save(
        tmp_path / "cam1" / "IMG_20200101_000000.jpg",
        t9003="2024:01:31 14:25:30",
        t010f="NIKON CORPORATION",
        t0110="NIKON D90",
    )
    found, _ = scene(file)
    assert (found.taken, found.camera) == (TIME, "NIKON D90")
    file = save(tmp_path / "x.jpg", t0132="2024:01:31 14:25:30", t010f="Canon", t0110="IXUS\0\x01")
    found, _ = scene(file)
    assert (found.taken, found.camera) == (TIME, "Canon IXUS")
    file = save(tmp_path / "cam1" / "y.jpg", t0132="0000:00:00 00:00:00")
    found, _ = scene(file)
    assert (found.taken, found.camera) == (None, "cam1")


def test_orientation_is_applied(tmp_path):
    found, image = scene(save(tmp_path / "turned.jpg", t0112=6))
    assert (found.height, found.width) == image.shape[:2] == (128, 96)
    np.testing.assert_allclose(image, np.rot90(photo(0), -1), atol=40)


@pytest.mark.parametrize(
    ("path", "taken", "camera"),
    [
        ("/PRW/frames/c3s1_000151.jpg", None, "c3"),
        ("/CUHK/Image/SSM/s1234.jpg", None, ""),
        ("/x/Camera 12/s1.jpg", None, "Camera 12"),
        ("/x/c12/c3s1_000151.jpg", None, "c12"),
        ("/x/IMG_20240131_142530.jpg", TIME, ""),
        ("/x/VID_20240131_142530123.mp4", TIME, ""),
        ("/x/2024-01-31 14.25.30.jpg", TIME, ""),
        ("/x/PXL_20240131-142530~2.jpg", TIME, ""),
        ("/2024-01-31/a.jpg", TIME.replace(hour=0, minute=0, second=0), ""),
        ("/x/20240231_142530.jpg", None, ""),
        ("/x/123420240131.jpg", None, ""),
        ("/x/1.jpg", None, ""),
    ],
)
def test_names_say_when_and_by_which_camera(path, taken, camera):
    found = origin(path)
    assert (found.taken, found.camera) == (taken, camera)


def test_files_come_by_name_and_once(tmp_path):
    names = ["b/2.jpg", "b/1.PNG", "a/x.webp", "c.tif", "B.jpeg"]
    write_photos(tmp_path, [name for name in names if not name.endswith(("webp", "tif"))])
    for name in ("a/x.webp", "c.tif", "a/notes.txt", "a/clip.MOV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "z.jpg").symlink_to("B.jpeg")
    skipped = {}
    found = [os.path.relpath(f.path, tmp_path) for f in media_files(str(tmp_path), skipped)]
    assert found == ["B.jpeg", "c.tif", "a/clip.MOV", "a/x.webp", "b/1.PNG", "b/2.jpg"]
    assert not skipped
    (one,) = media_files(str(tmp_path / "z.jpg"), skipped)
    assert one.path == str(tmp_path / "B.jpeg")
    for wrong in ("nothing", "a/notes.txt"):
        with pytest.raises(UserError, match=r"^--source: found "):
            list(media_files(str(tmp_path / wrong), skipped))


def test_a_folder_that_may_not_be_read_is_listed(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may read every folder")
    (tmp_path / "closed").mkdir(mode=0)
    skipped = {}
    assert list(media_files(str(tmp_path), skipped)) == []
    assert "Permission denied" in skipped[str(tmp_path / "closed")]


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("500ms", 0.5), ("2min", 120), (".5", 0.5), ("1.25s", 1.25)]
)
def test_times_between_frames(text, seconds):
    assert parse_every(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "1h", "s", "1e9", "nan", "0.1ms"])
def test_wrong_times_between_frames(text):
    with pytest.raises(UserError, match=r"^--every: found "):
        parse_every(text)
