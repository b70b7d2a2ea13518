"""What is found in folders as phones, disks and computers leave them; times and cameras."""

import datetime
import hashlib
import math
import os
import time

import PIL.Image
import pytest

from alignps_jax.errors import IncompleteError, UserError
from alignps_jax.media.walk import DEFAULT_EXCLUDES, MediaFile, media_files, origin, shots
from tests.media.clips import number_of, numbered, write_clip

APPLE, OWN_TAGS = "com.apple.quicktime.creationdate", {"movflags": "use_metadata_tags"}
TIME = datetime.datetime(2024, 1, 31, 14, 25, 30)
WHEN, LATER = "2024:01:31 14:25:30", "2025:06:01 10:00:00"
LIBRARY = """
    DCIM/100APPLE/IMG_0001.HEIC DCIM/100APPLE/IMG_0001.MOV DCIM/100APPLE/IMG_0001.AAE
    DCIM/Camera/PXL_20240131_142530.MP.jpg DCIM/Camera/VID.3gp DCIM/.thumbnails/1.jpg
    DCIM/Camera/.trashed-1700000000-IMG.jpg DCIM/Camera/.pending-1-VID.mp4
    nas/a.jpg nas/@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg nas/#recycle/b.jpg nas/.stversions/a.jpg
    nas/.Trash-1000/files/c.jpg nas/.@__thumb/a.jpg nas/scan.dng nas/scan.cr3 nas/b.CR3 nas/read
    mac/._d.jpg mac/d.jpeg mac/__MACOSX/d.jpeg mac/.DS_Store win/Thumbs.db win/e.JPG win/f.m2ts
    mac/Photos.photoslibrary/originals/0/g.heic mac/Photos.photoslibrary/resources/g_1.jpeg
    work/drafts/h.png work/drafts/more/i.webm work/k.avif
"""
FOUND = """
    DCIM/100APPLE/IMG_0001.HEIC DCIM/100APPLE/IMG_0001.MOV DCIM/Camera/PXL_20240131_142530.MP.jpg
    DCIM/Camera/VID.3gp mac/d.jpeg mac/Photos.photoslibrary/originals/0/g.heic nas/a.jpg
    win/e.JPG win/f.m2ts work/k.avif work/drafts/h.png work/drafts/more/i.webm
"""


def make(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return str(root)


def test_libraries_as_they_are(tmp_path, capsys):
    source, found = make(tmp_path, LIBRARY.split()), FOUND.split()
    walk = media_files([source])
    assert sorted(file.name for file in walk.files) == sorted(found)
    videos = [file.name[-4:] for file in walk.files if file.is_video]
    assert sorted(videos) == [".3gp", ".MOV", "m2ts", "webm"]
    assert walk.others == {".cr3": 2, ".dng": 1, ".aae": 1, "without a suffix": 1}
    walk.report()
    assert capsys.readouterr().out.startswith("not looked at: 2 .cr3, 1 ")
    excludes = (*DEFAULT_EXCLUDES, "**/drafts/**", "*.heic", "win")
    names = {file.name for file in media_files([source], excludes).files}
    left_out = {n for n in found if n.startswith(("work/d", "win")) or n.endswith("g.heic")}
    assert names == {*found} - left_out
    assert len(media_files([source], ()).files) == 23
    (only,) = media_files([f"{source}/nas/.stversions"]).files
    assert only.path == f"{source}/nas/.stversions/a.jpg"


def test_each_once_by_a_name_of_its_own(tmp_path, capsys):
    source = make(tmp_path / "s", ["b/2.jpg", "b/1.PNG", "c/x.mp4"])
    make(tmp_path, ["away/3.jpg", "away/in/4.jpg"])
    for link, target in (
        ("a", "b"), ("b/0.jpg", "2.jpg"), ("up", "."), ("z", tmp_path / "away"), ("gone.jpg", "no"),
        ("zero.jpg", "/dev/zero"), ("circle", "circle"), ("5.jpg", tmp_path / "away/3.jpg"),
        ("two\nlines.png", "no"),
    ):  # fmt: skip
        os.symlink(target, tmp_path / "s" / link)
    os.link(tmp_path / "s" / "b" / "2.jpg", tmp_path / "s" / "c" / "hard.jpg")
    os.mkfifo(tmp_path / "s" / "pipe.mp4")
    walk = media_files([source, source, f"{source}/b/2.jpg"])
    names = " ".join(file.name for file in walk.files)
    assert names == "5.jpg b/1.PNG b/2.jpg c/x.mp4 z/in/4.jpg"
    assert walk.files[0].path == f"{source}/5.jpg"
    skipped = {os.path.basename(path) for path in walk.skipped}
    assert skipped == {"gone.jpg", "zero.jpg", "pipe.mp4", "two\nlines.png"}
    with pytest.raises(IncompleteError, match="skipped 4 files"):
        walk.report()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_a_source_without_photos_is_an_error(tmp_path, capsys):
    source = make(tmp_path, ["IMG_1.CR3", "IMG_1.XMP"])
    for name in ("gone.jpg", "IMG_1.XMP"):
        with pytest.raises(UserError, match=rf"^--source: found .*{name}, expected a folder"):
            media_files([f"{source}/{name}"])
    with pytest.raises(UserError, match="found no photo or video"):
        media_files([source]).report()
    assert capsys.readouterr().out == "not looked at: 1 .cr3, 1 .xmp\n"


def saved(path, original=None, changed=None, make=None, model=None, **options):
    exif = PIL.Image.Exif()
    for tag, value in ((0x0132, changed), (0x010F, make), (0x0110, model)):
        if value:
            exif[tag] = value
    if original:
        exif.get_ifd(0x8769)[0x9003] = original
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(numbered(3)).save(path, exif=exif.tobytes(), **options)
    return path


def read(path, known=lambda _: None, every=0.5):
    state = os.stat(path)
    file = MediaFile(str(path), state.st_size, state.st_mtime_ns)
    return [task() for task in shots(file, every, 10**6, known)]


@pytest.fixture
def new_york(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


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
        ("/x/PXL_20240131_192530123.MP.jpg", TIME, ""),
        ("/x/PXL_20240131-192530~2.mp4", TIME, ""),
        ("/2024-01-31/a.jpg", TIME.replace(hour=0, minute=0, second=0), ""),
        ("/x/20240231_142530.jpg", None, ""),
        ("/x/123420240131.jpg", None, ""),
        ("/x/1.jpg", None, ""),
    ],
)
def test_names_say_when_and_by_which_camera(new_york, path, taken, camera):
    assert origin(path) == (taken, camera)


@pytest.mark.parametrize(
    ("name", "exif", "taken", "camera"),
    [
        ("cam1/IMG_20200101_000000.jpg", (WHEN, LATER, "NIKON CO", "NIKON D9"), TIME, "NIKON D9"),
        ("IMG_20240131_142530.jpg", (None, LATER, None, None), TIME, ""),
        ("x.heic", (None, WHEN, "Canon", "IXUS\0\x01"), TIME, "Canon IXUS"),
        ("cam1/y.jpg", (None, "0000:00:00 00:00:00", "", ""), None, "cam1"),
    ],
)
def test_what_photos_say(tmp_path, name, exif, taken, camera):
    (shot,) = read(saved(tmp_path / name, *exif))
    assert (shot.taken, shot.camera, shot.final, shot.error) == (taken, camera, True, None)
    assert shot.hash == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert number_of(shot.image) == 3


@pytest.mark.parametrize(
    ("name", "key", "text", "taken"),
    [
        ("a.mp4", "creation_time", "2024-01-31T19:25:30.000000Z", TIME),
        ("VID_20240131_142530.mp4", "creation_time", "2025-06-01T10:00:00.000000Z", TIME),
        ("b.mkv", "creation_time", "1904-01-01T00:00:00.000000Z", None),
        ("IMG_20200101_000000.mov", APPLE, "2024-01-31T14:25:30+0100", TIME),
    ],
)
def test_what_videos_say(tmp_path, new_york, name, key, text, taken):
    times = [number / 20 for number in range(30)]
    path = write_clip(tmp_path / name, times, muxing=OWN_TAGS, tags={key: text})
    *frames, end = read(path)
    assert [(shot.second, number_of(shot.image)) for shot in frames] == [(0, 0), (0.5, 10), (1, 20)]
    later = [taken and taken + datetime.timedelta(seconds=s) for s in (0, 0.5, 1)]
    assert [shot.taken for shot in frames] == later
    assert [shot.final for shot in frames] == [False] * 3
    assert (end.image, end.error, end.final) == (None, None, True)
    assert [shot.second for shot in read(path, known=lambda _: 0.5)] == [1.0, None]


def test_what_is_known_or_cannot_be_read(tmp_path):
    photo, clip = saved(tmp_path / "a.jpg"), write_clip(tmp_path / "b.mp4", [0, 1])
    for path in (photo, clip):
        asked = []
        (shot,) = read(path, known=lambda hash, asked=asked: asked.append(hash) or math.inf)
        assert (shot.image, shot.error, shot.final, [shot.hash]) == (None, None, True, asked)
    for name in ("c.jpg", "c.mp4"):
        (tmp_path / name).write_bytes(b"no photo")
        (shot,) = read(tmp_path / name)
        assert f"{name}: cannot be decoded" in str(shot.error)
        assert shot.final
    file = MediaFile(str(tmp_path / "gone.jpg"), 1, 1)
    (task,) = shots(file, 1.0, 10**6)
    assert "No such file" in str(task().error)

    def replace(_):
        photo.write_bytes(saved(tmp_path / "d.jpg", quality=50).read_bytes())

    (shot,) = read(photo, replace)
    assert "changes while it is read" in str(shot.error)
