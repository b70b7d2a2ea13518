"""What is found in folders as phones, disks and computers leave them; times and cameras."""

import datetime
import hashlib
import math
import os
import re
import time

import PIL.Image
import pytest

from alignps_jax.errors import IncompleteError, UserError
from alignps_jax.media import DEFAULT_EXCLUDES, Walk, is_video, origin, shots
from tests.media.clips import number_of, numbered, write_clip

APPLE = "com.apple.quicktime.creationdate"
TIME = datetime.datetime(2024, 1, 31, 14, 25, 30)
WHEN, LATER = "2024:01:31 14:25:30", "2025:06:01 10:00:00"
PHOTOS = """
    DCIM/100APPLE/IMG_0001.HEIC DCIM/Camera/PXL_20240131_142530.MP.jpg mac/d.jpeg nas/a.jpg
    mac/Photos.photoslibrary/originals/0/g.heic win/e.JPG work/drafts/h.png work/k.avif drafts/l.jpg
"""
VIDEOS = "DCIM/100APPLE/IMG_0001.MOV DCIM/Camera/VID.3gp win/f.m2ts work/drafts/more/i.webm"
OTHERS = """
    DCIM/.thumbnails/1.jpg DCIM/Camera/.trashed-1700000000-IMG.jpg nas/@eaDir/a.jpg/SYNO_XL.jpg
    nas/#recycle/b.jpg nas/.stversions/a.jpg nas/.Trash-1000/files/c.jpg nas/.@__thumb/a.jpg
    mac/._d.jpg mac/__MACOSX/d.jpeg mac/.DS_Store mac/Photos.photoslibrary/resources/g_1.jpeg
    win/Thumbs.db nas/scan.dng nas/scan.cr3 nas/b.CR3 nas/read
"""


def make(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return str(root)


def names(walk, source):
    return sorted(os.path.relpath(path, source) for path in walk.files)


def test_libraries_as_they_are(tmp_path, capsys):
    wanted = [*PHOTOS.split(), *VIDEOS.split()]
    source = make(tmp_path, (*wanted, *OTHERS.split()))
    walk = Walk([source])
    assert names(walk, source) == sorted(wanted)
    assert [one for one in names(walk, source) if is_video(one)] == sorted(VIDEOS.split())
    walk.report()
    assert capsys.readouterr().out == "not looked at: 2 .cr3, 1 without a suffix, 1 .dng\n"
    excludes = (*DEFAULT_EXCLUDES, "**/drafts/**", "*.heic", "win")
    found = names(Walk([source], excludes), source)
    assert found == sorted(x for x in wanted if not re.search(r"^win|drafts/|g\.heic$", x))
    assert len(Walk([source], ()).files) == 23
    (only,) = Walk([f"{source}/nas/.stversions"]).files
    assert only == f"{source}/nas/.stversions/a.jpg"


def test_each_once_and_nothing_that_may_not_end(tmp_path, capsys):
    source = make(tmp_path / "s", ["b/2.jpg", "b/1.PNG", "c/x.mp4"])
    make(tmp_path, ["away/3.jpg", "away/in/4.jpg"])
    links = {"a": "b", "b/0.jpg": "2.jpg", "up": ".", "z": "../away", "gone.jpg": "no"}
    links |= {"zero.jpg": "/dev/zero", "circle": "circle", "5.jpg": "../away/3.jpg"}
    for link, target in links.items():
        os.symlink(target, tmp_path / "s" / link)
    os.mkfifo(tmp_path / "s" / "pipe.mp4")
    (tmp_path / "s" / os.fsdecode(b"\xff\x1b.jpg")).touch()
    walk = Walk([source, source, f"{source}/b/2.jpg"])
    assert names(walk, source) == ["5.jpg", "b/1.PNG", "b/2.jpg", "c/x.mp4", "z/in/4.jpg"]
    with pytest.raises(IncompleteError, match="files skipped: 4 "):
        walk.report()
    lines = capsys.readouterr().out.splitlines()
    expected = ("without a suffix", "/pipe.mp4'", r"/\udcff\x1b.jpg'", "/gone.jpg'", "/zero.jpg'")
    assert [part in line for part, line in zip(expected, lines, strict=True)] == [True] * 5


def test_a_source_without_photos_is_an_error(tmp_path, capsys):
    source = make(tmp_path, ["IMG_1.CR3", "IMG_1.XMP"])
    for name, line in ("", "not looked at: 1 .cr3, 1 .xmp"), ("/gone.jpg", "No such file"):
        with pytest.raises(UserError, match="found no photo or video"):
            Walk([source + name]).report()
        assert line in capsys.readouterr().out
    assert Walk([f"{source}/IMG_1.CR3"]).files  # one that is named is tried


@pytest.fixture(autouse=True)
def new_york(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("path", "about", "taken", "camera"),
    [
        ("/PRW/frames/c3s1_000151.jpg", {}, None, "c3"),
        ("/x/Camera 12/s1234.jpg", {"DateTime": "0000:00:00 00:00:00"}, None, "Camera 12"),
        ("/x/c12/c3s1_000151.jpg", {}, None, "c12"),
        ("/x/VID_20240131_142530123.mp4", {"creation_time": LATER}, TIME, ""),
        ("/x/IMG20240131142530.jpg", {"DateTime": LATER}, TIME, ""),
        ("/x/Screenshot 2024-01-31 at 14.25.30.png", {}, TIME, ""),
        ("/x/PXL_20240131_192530123.MP.jpg", {}, TIME, ""),
        ("/2024-01-31/a.jpg", {}, TIME.replace(hour=0, minute=0, second=0), ""),
        ("/x/20240231_142530.jpg", {}, None, ""),
        ("/x/123420240131.jpg", {}, None, ""),
        ("/x/a.jpg", {"DateTime": WHEN, "Make": "Canon", "Model": "EOS\0\x01"}, TIME, "Canon EOS"),
        ("/cam1/a.jpg", {"Make": "NIKON", "Model": "NIKON D9"}, None, "NIKON D9"),
        ("/x/b.mkv", {"creation_time": "1904-01-01T00:00:00.000000Z"}, None, ""),
        ("/x/IMG_20200101_000000.mov", {APPLE: "2024-01-31T14:25:30+0100"}, TIME, ""),
    ],
)
def test_when_and_by_which_camera(path, about, taken, camera):
    assert origin(path, about) == (taken, camera)


def saved(path):
    exif = PIL.Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = WHEN
    exif[0x0110] = "EOS"
    PIL.Image.fromarray(numbered(3)).save(path, exif=exif.tobytes())
    return path


def read(path, after=-1):
    known = {hashlib.sha256(path.read_bytes()).hexdigest(): after}
    return [task() for task in shots(str(path), 0.5, 10**6, known)]


@pytest.mark.parametrize("name", ["IMG_20200101_000000.jpg", "a.heic", "a.jfif"])
def test_shot_of_a_photo(tmp_path, name):
    (shot,) = read(saved(tmp_path / name))
    assert (shot.taken, shot.camera, shot.second, shot.error) == (TIME, "EOS", None, None)
    assert (number_of(shot.image), shot.size) == (3, (96, 128))


def test_shots_of_a_video(tmp_path):
    tags = {"creation_time": "2024-01-31T19:25:30.000000Z"}
    path = write_clip(tmp_path / "a.mp4", [n / 20 for n in range(30)], tags=tags)
    *found, end = read(path)
    assert [(shot.second, number_of(shot.image)) for shot in found] == [(0, 0), (0.5, 10), (1, 20)]
    assert {shot.taken - datetime.timedelta(seconds=shot.second) for shot in found} == {TIME}
    assert (end.image, end.error, end.second) == (None, None, None)
    assert [shot.second for shot in read(path, 0.5)] == [1.0, None]


def test_what_is_known_or_cannot_be_read(tmp_path):
    for path in (saved(tmp_path / "a.jpg"), write_clip(tmp_path / "b.mp4", [0, 1])):
        (shot,) = read(path, math.inf)
        assert (shot.image, shot.error, shot.second) == (None, None, None)
        assert shot.hash == hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_stem("bad").write_bytes(b"no photo")
        (shot,) = read(path.with_stem("bad"))
        assert (f"{shot.path}: " in str(shot.error), shot.second) == (True, None)
        (gone,) = shots(f"{path}{path.suffix}", 0.5, 10**6)
        assert "No such file" in str(gone().error)
