"""The data sets by name, and preparing them for real (TFDS, ArrayRecord) from miniature folders."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from alignps_jax.types import UserError
from data_pipeline import datasets
from data_pipeline.pipeline import photo_of
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import ROOT, SHARED

TRAIN = {
    "c1s1_000001": [(5, 10, 20, 30, 20), (-2, 50, 20, 400, 20)],
    "c2s1_000002": [(9, 1, 2, 30, 40), (5, 700, 20, 10, 10)],
    "c1s1_000003": [],
}
TEST = {
    "c1s1_000004": [(5, 10, 20, 30, 20), (7, 50, 20, 400, 20)],
    "c3s1_000005": [(5, 11, 21, 31, 21), (-2, 1, 2, 3, 4)],
    "c3s1_000006": [(7, 3, 4, 5, 6)],
}
QUERIES = [(5, 10, 20, 30, 20, "c1s1_000004"), (7, 3, 4, 5, 6, "c3s1_000006")]
SIZES = {"c1s1_000001": (60, 90), "c2s1_000002": (90, 60), "c1s1_000003": (33, 47)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in PRW's layout with its photos."""
    folder = tmp_path / "mini"
    fixtures.write_prw(folder, TRAIN, TEST, QUERIES)
    for seed, name in enumerate([*TRAIN, *TEST]):
        height, width = SIZES.get(name, (50, 70))
        fixtures.write_photo(folder / "frames" / f"{name}.jpg", height, width, seed)
    return folder


@pytest.fixture
def data(root: Path):
    return fixtures.data_config("prw", root)


def sets(data) -> list[Path]:
    folder = Path(data.prepared_dir or Path(data.root) / "prepared") / data.name
    return [path for path in folder.iterdir() if path.is_dir()]


def photos_of(split) -> list[bytes]:
    return [split.encoded(image) for image in range(len(split.sizes))]


def assert_same(first: object, second: object) -> None:
    """Of annotations or protocols: every field of the second one, with its type."""
    for name, other in vars(second).items():
        value = getattr(first, name)
        assert len(value) == len(other)
        rows = ((value,), (other,)) if isinstance(value, np.ndarray | str) else (value, other)
        for one, two in zip(*rows, strict=True):
            np.testing.assert_array_equal(one, two)
            assert np.asarray(one).dtype == np.asarray(two).dtype


def test_prepared_set_holds_the_original_bytes_and_people_clipped_to_the_photo(data, root, capsys):
    prepared = datasets.prepare(data)
    train, test = prepared.split("train"), prepared.split("test")
    assert train.annotations.names == tuple(f"{name}.jpg" for name in TRAIN)
    for split in (train, test):
        names = split.annotations.names
        assert photos_of(split) == [(root / "frames" / name).read_bytes() for name in names]
    assert train.sizes.tolist() == [[60, 90], [90, 60], [33, 47]]
    np.testing.assert_array_equal(train.annotations.boxes[0], [[10, 20, 40, 40], [50, 20, 90, 40]])
    # The second box lies beside the photo, and its identity goes with it.
    np.testing.assert_array_equal(train.annotations.boxes[1], [[1, 2, 31, 42]])
    assert [ids.tolist() for ids in train.annotations.identity] == [[0, -1], [1], []]
    assert [mask.tolist() for mask in train.annotations.labeled] == [[True, False], [True], []]
    assert train.annotations.camera.tolist() == [1, 2, 1]
    assert "       3 training images (published: 5,704)\n" in capsys.readouterr().out
    order = [2, 0, 1] * 20
    with futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(train.encoded, order)) == [train.encoded(i) for i in order]
    # It is an ordinary data set of TFDS.
    builder = tfds.builder_from_directory(prepared.folder)
    example = builder.as_data_source(split="train")[1]
    assert example["name"] == b"c2s1_000002.jpg"
    assert example["image"].shape == (90, 60, 3)
    assert (example["height"], example["width"], example["camera"]) == (90, 60, 2)
    people = {field: example[field].tolist() for field in ("boxes", "identity", "labeled")}
    assert people == {"boxes": [[1, 2, 31, 42]], "identity": [1], "labeled": [True]}
    assert builder.info.splits["test"].num_examples == 3


@pytest.mark.parametrize("name", ["prw", "cuhk_sysu"])
def test_a_prepared_set_is_read_and_no_annotation_file_opened(root, tmp_path, name, capsys):
    if name == "cuhk_sysu":
        fixtures.write_small_cuhk(root := tmp_path / "cuhk")
    data = fixtures.data_config(name, root)
    source = datasets.DATASETS[name](root)
    train, test, protocols = source.train, source.test, list(map(source.protocol, source.protocols))
    defaults = source.default_protocols
    assert_same(datasets.load_test(data, ())[0], test)
    first = datasets.prepare(data)
    for path in (root / file for file in source.annotation_files()):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(0, before.st_mtime_ns))
    written = {path: path.stat().st_mtime_ns for path in (root / "prepared").rglob("*")}
    capsys.readouterr()
    people, found = datasets.load_test(data, source.protocols)
    assert_same(people, test)
    assert_same(datasets.load_train(data), train)
    for one, other in zip(found, protocols, strict=True):
        assert_same(one, other)
    found = datasets.load_test(data, ())[1]
    assert tuple(protocol.name for protocol in found) == defaults
    second = datasets.prepare(data)
    for split in ("train", "test"):
        one, other = first.split(split), second.split(split)
        assert_same(one.annotations, other.annotations)
        assert photos_of(one) == photos_of(other)
    assert capsys.readouterr().out.count("\n") == 1
    assert written == {path: path.stat().st_mtime_ns for path in (root / "prepared").rglob("*")}


def test_an_optional_protocol_that_cannot_be_read_stops_nothing(tmp_path, capsys):
    fixtures.write_small_cuhk(tmp_path)
    (tmp_path / "annotation" / "test" / "subset" / "Occlusion.mat").write_bytes(b"odd")
    data = fixtures.data_config("cuhk_sysu", tmp_path)
    datasets.prepare(data)
    assert len(datasets.load_test(data, ())[1]) == 3
    assert "there is no protocol occlusion" in capsys.readouterr().out
    with pytest.raises(UserError, match="one of TestG50, TestG100, all; did you mean 'TestG50'"):
        datasets.load_test(data, ("TestG51",))


def test_a_prepared_set_lives_without_its_originals(data, root, tmp_path):
    before = datasets.prepare(data).train
    shutil.copytree(root / "prepared", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(root)
    data.prepared_dir = str(tmp_path / "copy")
    after = datasets.prepare(data)
    assert_same(after.train, before)
    assert len(photos_of(after.split("test"))) == 3
    assert len(datasets.load_test(data, ())[1]) == 2
    shutil.copytree(sets(data)[0], tmp_path / "copy" / "prw" / "other")
    with pytest.raises(UserError, match="lacks the annotations that tell which"):
        datasets.prepare(data)


def test_other_annotations_make_another_set_and_new_times_none(data, root):
    old = datasets.prepare(data).train
    for path in root.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    datasets.prepare(data)
    assert len(sets(data)) == 1
    changed = TRAIN | {"c1s1_000003": [(9, 1, 2, 3, 4)]}
    fixtures.write_prw(root, changed, TEST, QUERIES)
    new = datasets.prepare(data).train
    assert [len(rows) for rows in old.boxes] == [2, 2, 0]
    assert [len(rows) for rows in new.boxes] == [2, 2, 1]
    assert len(sets(data)) == 2
    fixtures.write_prw(root, TRAIN, TEST, QUERIES)
    assert [len(rows) for rows in datasets.load_train(data).boxes] == [2, 2, 0]
    assert len(sets(data)) == 2


def test_replaced_photos_are_seen_and_taken_once_that_is_asked_for(data, root, capsys):
    datasets.prepare(data)
    path = root / "frames" / "c1s1_000004.jpg"
    (root / "frames" / "c3s1_000005.jpg").unlink()  # the originals may be gone
    blurred = fixtures.write_photo(path, 50, 70, seed=99)
    assert datasets.prepare(data).split("test").encoded(0) != blurred
    assert "1 of 6 photos in" in capsys.readouterr().out
    fixtures.write_photo(root / "frames" / "c3s1_000005.jpg", 50, 70)
    data.prepare_again = True
    assert datasets.prepare(data).split("test").encoded(0) == blurred
    assert data.prepare_again is False
    assert datasets.prepare(data).split("test").encoded(0) == blurred
    assert len(sets(data)) == 1
    assert "prepare_again" not in capsys.readouterr().out


def test_photos_that_cannot_be_used_are_all_named_and_stop_nothing(data, root, capsys):
    frames = root / "frames"
    (frames / "c1s1_000001.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid")
    (frames / "c3s1_000005.jpg").write_bytes((frames / "c3s1_000005.jpg").read_bytes()[:-200])
    fixtures.write_photo(frames / "c1s1_000004.jpg", 400, 500)
    data.max_pixels = 100_000
    with pytest.raises(UserError) as error:
        datasets.prepare(data)
    assert "3 photos cannot be used" in str(error.value)
    for words in ("1.jpg: is a Git LFS pointer", "5.jpg: found a truncated JPEG", "500x400"):
        assert str(error.value).count(words) == 1
    (frames / "c1s1_000001.jpg").unlink()  # no photo is read again
    data.skip_damaged = True
    capsys.readouterr()
    prepared = datasets.prepare(data)
    printed = capsys.readouterr().out
    assert "preparing" not in printed
    assert "3 photos cannot be used: they are not trained on" in printed
    assert [len(boxes) for boxes in prepared.split("train").annotations.boxes] == [0, 1, 0]
    assert [photo_of(prepared.split("test"), image).any() for image in (1, 2)] == [False, True]


def test_missing_photos_are_counted_before_any_is_read(data, root):
    (root / "frames" / "c1s1_000003.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 6 photos are missing(.|\n)*c1s1_000003\.jpg"):
        datasets.prepare(data)
    assert not sets(data)
    data.skip_damaged = True
    assert len(photos_of(datasets.prepare(data).split("train"))) == 3


def test_what_is_odd_about_photos_is_counted(data, root, capsys):
    frames = root / "frames"
    flat = {"c3s1_000006": [(7, 3, 4, 5, 6), (-2, 9, 9, 0, 5)]}
    fixtures.write_prw(root, TRAIN, TEST | flat, QUERIES)
    shutil.copy(frames / "c1s1_000003.jpg", frames / "c1s1_000004.jpg")
    encoded = (frames / "c1s1_000003.jpg").read_bytes()
    (frames / "c1s1_000003.jpg").write_bytes(encoded[:-2])
    shutil.copy(frames / "c1s1_000003.jpg", frames / "c3s1_000005.jpg")
    split = datasets.prepare(data).split("train")
    printed = capsys.readouterr().out
    assert "1 test photos are training photos" in printed
    datasets.load_test(data, ())
    assert capsys.readouterr().out == f"{root}: 1 boxes without area are left out\n"
    assert photo_of(split, 2).shape == (33, 47, 3)


@pytest.mark.parametrize(
    ("file_format", "turn"), [("jpeg", 6), ("png", 8), ("tiff", 3), ("tiff", 5)]
)
def test_photos_come_as_stored_or_upright(tmp_path, file_format, turn):
    pixels = np.arange(600, dtype=np.uint8).reshape(10, 20, 3)
    photo = Image.fromarray(pixels.repeat(4, 0).repeat(4, 1))
    photo.getexif()[0x0112] = turn
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        photo.save(tmp_path / "images" / name, file_format, exif=photo.getexif())
    for orientation, shown in (("stored", photo), ("upright", ImageOps.exif_transpose(photo))):
        data = fixtures.data_config("coco_person_search", tmp_path)
        data.orientation = orientation
        sizes = dict.fromkeys(("a.jpg", "b.jpg"), shown.size[::-1])
        people = fixtures.coco(sizes, [(name, (5, 6, 20, 15), 0) for name in sizes])
        for part in ("train", "test"):
            fixtures.write_json(tmp_path / f"{part}.json", people)
        split = datasets.prepare(data).split("train")
        assert split.sizes.tolist() == [list(shown.size[::-1])] * 2
        assert np.abs(photo_of(split, 0).astype(int) - np.asarray(shown)).mean() < 6
    if turn >= 5:
        data.orientation = "stored"
        with pytest.raises(UserError, match=r"80x40 \(EXIF turns it: data.orientation=upright"):
            datasets.prepare(data)


def _prepare_elsewhere(root: Path, before: str) -> subprocess.CompletedProcess[str]:
    code = f"""
from data_pipeline import datasets, preparation
from tests.data_pipeline import dataset_fixtures
{before}
datasets.prepare(dataset_fixtures.data_config("prw", {str(root)!r}))
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_killed_preparation_is_not_taken_for_a_complete_one(data, root):
    died = _prepare_elsewhere(root, "import os; preparation.write_about = lambda *_: os._exit(9)")
    assert died.returncode == 9, died.stderr
    assert [path.suffix[:9] for path in sets(data)] == [".partial-"]
    assert len(photos_of(datasets.prepare(data).split("test"))) == 3
    assert len(sets(data)) == 1


def test_a_full_disk_says_so_in_its_own_words(data, root):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    failed = _prepare_elsewhere(root, limit)
    assert failed.returncode == 1
    assert re.match("OSError: .*File too large", failed.stderr.splitlines()[-1])
    assert not sets(data)


def test_one_process_prepares_and_the_others_wait(data, root, capsys):
    (root / "prepared" / "prw").mkdir(parents=True)
    lock = filelock.FileLock(root / "prepared" / "prw" / ".lock")
    with lock:
        thread = threading.Thread(target=datasets.prepare, args=(data,))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not sets(data)
    thread.join()
    assert "waiting for the process" in capsys.readouterr().out
    assert len(sets(data)) == 1


def test_a_file_system_without_locks_is_a_note(data, monkeypatch, capsys):
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert datasets.prepare(data).folder in sets(data)
    assert "note: " in capsys.readouterr().out


def test_a_set_of_somebody_else_imports_nothing_and_says_what_is_wrong(data, tmp_path, monkeypatch):
    expected = datasets.prepare(data).split("train").encoded(1)
    (tmp_path / "stranger.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    (folder,) = sets(data)
    text = (folder / "features.json").read_text()
    changed = re.sub(r'("pythonClassName": )"[^"]+"', r'\1"stranger.Feature"', text)
    assert changed != text
    (folder / "features.json").write_text(changed)
    assert datasets.prepare(data).split("train").encoded(1) == expected
    assert "stranger" not in sys.modules
    (folder / "about-2.json").write_text('{"digest": 3}')
    with pytest.raises(UserError, match=r"about-2\.json: "):
        datasets.prepare(data)


def test_synthetic_is_drawn_first_and_read_as_cuhk_sysu(tmp_path, capsys):
    data = fixtures.data_config("synthetic", tmp_path / "synthetic")
    shape = {"train_images": 24, "test_images": 55, "train_identities": 8, "test_identities": 9}
    data.synthetic.update(shape | {"height": 64, "width": 96})
    prepared = datasets.prepare(data)
    assert f"found no scenes in {tmp_path / 'synthetic'}" in capsys.readouterr().out
    assert (prepared.train.num_identities, prepared.test.num_identities) == (8, 9)
    assert (prepared.split("train").sizes == [64, 96]).all()
    protocol, everything = datasets.load_test(data, ())[1]
    assert (protocol.name, everything.name) == ("TestG50", "all")
    assert len(protocol.gallery[0]) == 50


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real PRW slice is not here")
def test_real_slice_of_prw(tmp_path):
    source = SHARED / "prw_sample"
    prepared = datasets.prepare(fixtures.data_config("prw", source, tmp_path))
    assert (prepared.split("train").sizes == [1080, 1920]).all()
    frame = source / "frames" / prepared.test.names[5]
    assert prepared.split("test").encoded(5) == frame.read_bytes()
