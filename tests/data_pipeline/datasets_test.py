"""The data sets by name, and preparing them for real (TFDS, ArrayRecord) from miniature folders."""

import os
import pickle
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from alignps_jax.types import UserError
from data_pipeline import datasets
from data_pipeline import prepared as builder
from data_pipeline.pipeline import photo_of
from data_pipeline.sources.prw import Prw
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import ROOT, SHARED

TRAIN = {
    "c1s1_000001": [(5, 10, 20, 30, 20), (-2, 50, 20, 400, 20)],
    "c2s1_000002": [(9, 1, 2, 30, 40), (5, 700, 20, 10, 10)],
    "c1s1_000003": [],
}
TEST = {
    "c1s1_000004": [(5, 10, 20, 30, 20)],
    "c3s1_000005": [(5, 11, 21, 31, 21), (-2, 1, 2, 3, 4)],
}
QUERIES = [(5, 10, 20, 30, 20, "c1s1_000004")]
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


def _encoded(root: Path, name: str) -> bytes:
    return (root / "frames" / name).read_bytes()


def test_prepared_set_holds_the_original_bytes_and_people_clipped_to_the_photo(root, capsys):
    data = fixtures.data_config("prw", root)
    prepared = datasets.prepare(data)
    train, test = prepared.train, prepared.test
    assert train.annotations.names == tuple(f"{name}.jpg" for name in TRAIN)
    assert len(train.jpegs) == 3
    assert len(test.jpegs) == 2
    for split in (train, test):
        names = split.annotations.names
        assert list(split.jpegs) == [_encoded(root, name) for name in names]
    assert train.sizes.tolist() == [[60, 90], [90, 60], [33, 47]]
    np.testing.assert_array_equal(train.annotations.boxes[0], [[10, 20, 40, 40], [50, 20, 90, 40]])
    # The second box lies beside the photo, and its identity goes with it.
    np.testing.assert_array_equal(train.annotations.boxes[1], [[1, 2, 31, 42]])
    assert [ids.tolist() for ids in train.annotations.identity] == [[0, -1], [1], []]
    assert [mask.tolist() for mask in train.annotations.labeled] == [[True, False], [True], []]
    assert train.annotations.camera.tolist() == [1, 2, 1]

    printed = capsys.readouterr()
    assert "clipped 1 boxes to their photo, dropped 1 outside" in printed.out
    assert "training images              3       5,704" in printed.out
    assert printed.out.count("warning: differs from what is published") == 1
    assert printed.err == ""


def test_second_time_one_line_and_no_writing(root, capsys):
    data = fixtures.data_config("prw", root)
    first = datasets.prepare(data)
    files = {path: path.stat().st_mtime_ns for path in (root / "prepared").rglob("*")}
    capsys.readouterr()
    second = datasets.prepare(data)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("PRW: 3 train and 2 test images in ")
    assert files == {path: path.stat().st_mtime_ns for path in (root / "prepared").rglob("*")}
    assert list(second.test.jpegs) == list(first.test.jpegs)
    np.testing.assert_array_equal(second.train.sizes, first.train.sizes)
    assert second.train.annotations.names == first.train.annotations.names


def test_records_are_an_ordinary_tfds_data_set(root):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    prw = datasets.DATASETS["prw"](root=root, data_dir=root / "prepared", max_pixels=10**6)
    records = prw.as_data_source(split="train")
    example = records[1]
    assert example["name"] == b"c2s1_000002.jpg"
    assert example["image"].shape == (90, 60, 3)
    assert (example["height"], example["width"], example["camera"]) == (90, 60, 2)
    np.testing.assert_array_equal(example["boxes"], [[1, 2, 31, 42]])
    assert example["identity"].tolist() == [1]
    assert example["labeled"].tolist() == [True]
    assert prw.info.splits["test"].num_examples == 2
    assert isinstance(prw, tfds.core.DatasetBuilder)


def test_changed_annotations_are_prepared_anew_beside_the_old_ones(root):
    data = fixtures.data_config("prw", root)
    old = datasets.prepare(data)
    changed = TRAIN | {"c1s1_000003": [(9, 1, 2, 3, 4)]}
    fixtures.write_prw(root, changed, TEST, QUERIES)
    new = datasets.prepare(data)
    assert [len(rows) for rows in old.train.annotations.boxes] == [2, 1, 0]
    assert [len(rows) for rows in new.train.annotations.boxes] == [2, 1, 1]
    assert len(list((root / "prepared" / "prw").iterdir())) == 2


def test_fingerprint_depends_on_every_part():
    def annotations(name="a", box=1.0, identity=0, labeled=True, camera=0, second=0):
        return datasets.Annotations(
            names=(name, "b"),
            boxes=(np.full((1 - second, 4), box), np.full((second, 4), box)),
            identity=(np.full(1 - second, identity), np.full(second, identity)),
            labeled=(np.full(1 - second, labeled), np.full(second, labeled)),
            camera=np.array([camera, 0]),
        )

    variants = [
        {"name": "c"},
        {"box": 2.0},
        {"identity": 1},
        {"labeled": False},
        {"camera": 1},
        {"second": 1},
    ]
    photos = [(7, 10), (8, 10)]
    prints = {
        builder.fingerprint({"train": annotations(**kinds)}, {"train": photos})
        for kinds in [{}, *variants]
    }
    assert len(prints) == 7
    assert builder.fingerprint({"test": annotations()}, {"test": photos}) not in prints
    assert builder.fingerprint({"train": annotations()}, {"train": photos}) in prints
    for others in ([(6, 10), (8, 10)], [(7, 10), (8, 11)], [(7, 10), None], [(8, 10), (7, 10)]):
        prints.add(builder.fingerprint({"train": annotations()}, {"train": others}))
    assert len(prints) == 11


def test_stored_images_are_picklable_and_shared_by_threads(root):
    prw = Prw(root=root, data_dir=root / "prepared", max_pixels=10**6, shard_images=2)
    prw.prepare()
    jpegs = prw.open("train").jpegs
    assert len(list((root / "prepared").rglob("prw-train.array_record-*-of-00002"))) == 2
    expected = [_encoded(root, f"{name}.jpg") for name in TRAIN]
    again = pickle.loads(pickle.dumps(jpegs))
    order = [2, 0, 1] * 20
    with futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again.__getitem__, order)) == [expected[i] for i in order]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            _ = jpegs[outside]


def _fail(root: Path, **fields: object) -> str:
    """The message of a preparation that must fail and leave nothing complete."""
    data = fixtures.data_config("prw", root)
    data.update(fields)
    with pytest.raises(UserError) as error:
        datasets.prepare(data)
    assert "\n" not in str(error.value)
    assert not list(root.rglob("dataset_info.json"))
    assert not list(root.rglob("incomplete.*"))
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.999])
def test_truncated_photo_is_named(root, share):
    path = root / "frames" / "c3s1_000005.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[: int(share * len(encoded))])
    message = _fail(root)
    assert str(path) in message
    assert "complete" in message


def test_truncated_jpeg_is_noticed_whatever_opencv_makes_of_it(root):
    """Some versions of OpenCV fill up the rest; an embedded preview ends with an end marker."""
    path = root / "frames" / "c3s1_000005.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[:2] + b"\xff\xe1\x00\x06\xff\xda\xff\xd9" + encoded[2:-2])
    assert f"{path}: truncated JPEG" in _fail(root)


def test_photos_with_too_many_pixels_are_named(root):
    message = _fail(root, max_pixels=100)
    assert "pixels; expected at most 100 in all (data.max_pixels)" in message
    assert str(root / "frames") in message
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    data.max_pixels = 100
    with pytest.raises(UserError, match=r"pixels; expected at most 100 \(data.max_pixels\)"):
        datasets.prepare(data)


def test_missing_photos_are_counted(root):
    path = root / "frames" / "c1s1_000003.jpg"
    path.unlink()
    assert f"{path}: no such image; missing: 1 of the 3 train images" in _fail(root)


def test_folder_that_cannot_be_written(root):
    blocked = root / "file"
    blocked.write_text("not a folder")
    message = _fail(root, prepared_dir=str(blocked))
    assert str(blocked) in message
    assert "--config.data.prepared_dir" in message


def test_lost_file_of_a_prepared_set_is_named(root):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    record = next((root / "prepared").rglob("prw-test.array_record*"))
    record.unlink()
    with pytest.raises(UserError, match=rf"{record.name}: no such file, but part of a prepared"):
        datasets.prepare(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"test": [[90, 60], [50, 70]]}', "KeyError: 'train'"),
        ('{"train": [[90, 60]], "test": []}', "no heights and widths of 3 photos"),
        ('{"train": [[90, 60], [90], [1, 2]]}', "ValueError"),
        ('{"train": [[90, 60], [90, 1.5], [1, 2]]}', "no heights and widths of 3 photos"),
        ('{"train": [[90, 60], [90, -5], [1, 2]]}', "no heights and widths of 3 photos"),
        ('{"train": [[90, 60], [90, 1e400], [1, 2]]}', "no heights and widths of 3 photos"),
        (f'{{"train": [[90, 60], [90, {10**400}], [1, 2]]}}', "no heights and widths of 3"),
        ('{"train": [[90, 60], [90, 4294967297], [1, 2]]}', "no heights and widths of 3 photos"),
        ('{"train": [[90, 60], [90, 70], [99999, 99999]]}', "at most 100,000,000 .data.max_pix"),
    ],
)
def test_damaged_sizes_are_one_line(root, content, message):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    next((root / "prepared").rglob("sizes.json")).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        datasets.prepare(data)
    assert "\n" not in str(error.value)
    assert str(root / "prepared" / "prw") in str(error.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "prw-train.array_record-00000-of-00001"])
@pytest.mark.parametrize("damage", ["empty", "noise", "other"])
@pytest.mark.usefixtures("unchecked")
def test_damaged_files_of_a_prepared_set_are_one_line(root, name, damage):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    path = next((root / "prepared").rglob(name))
    sound = path.read_bytes()
    other = path.with_name(name.replace("train", "test")).read_bytes()
    noise = sound[:100] + np.random.default_rng(0).bytes(len(sound) - 100)
    path.write_bytes({"empty": b"", "noise": noise, "other": other}[damage])
    if other == sound:
        path.write_text('{"splits": [{"name": "test"}]}')
    with pytest.raises(UserError, match=r"delete") as error:
        list(datasets.prepare(data).train.jpegs)
    assert "\n" not in str(error.value)
    assert str(root / "prepared" / "prw") in str(error.value)


def test_people_of_a_prepared_split_are_those_of_its_records(root):
    data = fixtures.data_config("prw", root)
    splits = datasets.prepare(data)
    prw = datasets.DATASETS["prw"](
        root=root, data_dir=root / "prepared", max_pixels=data.max_pixels
    )
    for name in ("train", "test"):
        people = getattr(splits, name).annotations
        for row, example in enumerate(prw.as_data_source(split=name)):
            assert people.names[row] == example["name"].decode()
            np.testing.assert_array_equal(people.boxes[row], example["boxes"])
            np.testing.assert_array_equal(people.identity[row], example["identity"])
            np.testing.assert_array_equal(people.labeled[row], example["labeled"])
            assert people.camera[row] == example["camera"]


def test_killed_preparation_is_not_taken_for_a_complete_one(root, capsys):
    code = f"""
import os
from data_pipeline import datasets
from data_pipeline import prepared as builder
from tests.data_pipeline import dataset_fixtures
read = builder._read_photo
def die(source, annotations, max_pixels, index):
    return os._exit(9) if annotations.names[index].startswith("c3") else read(
        source, annotations, max_pixels, index)
builder._read_photo = die
datasets.prepare(dataset_fixtures.data_config("prw", {str(root)!r}))
"""
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert died.returncode == 9
    assert len(list(root.rglob("incomplete.*"))) == 1
    prepared = datasets.prepare(fixtures.data_config("prw", root))
    assert list(prepared.test.jpegs) == [_encoded(root, f"{name}.jpg") for name in TEST]
    assert "removed, process" in capsys.readouterr().out
    assert not list(root.rglob("incomplete.*"))


def _replaced(path: Path) -> None:
    """Another photo of the same size in bytes."""
    other = bytearray(path.read_bytes())
    other[-3] ^= 1
    path.write_bytes(other)


def _restored(path: Path) -> None:
    """Another photo with the time of the old one, as archives give it."""
    about = path.stat()
    fixtures.write_photo(path, 50, 70, seed=99)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("change", [_replaced, _restored, Path.touch])
def test_changed_photos_are_never_served_from_old_records(root, change, capsys):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    before = _encoded(root, "c1s1_000004.jpg")
    change(root / "frames" / "c1s1_000004.jpg")
    capsys.readouterr()
    jpegs = datasets.prepare(data).test.jpegs
    assert jpegs[0] == _encoded(root, "c1s1_000004.jpg")
    assert (jpegs[0] == before) == (change is Path.touch)
    assert "made from other annotations or photos; stays until" in capsys.readouterr().out
    assert len(list((root / "prepared" / "prw").iterdir())) == 2


def test_photos_that_are_gone_are_missed_although_they_are_prepared(root):
    data = fixtures.data_config("prw", root)
    datasets.prepare(data)
    (root / "frames" / "c1s1_000004.jpg").unlink()
    with pytest.raises(UserError, match=r"c1s1_000004\.jpg: no such image"):
        datasets.prepare(data)


def test_photos_that_change_during_the_preparation_are_an_error(root):
    # The last photo is read long after the first one was.
    path = root / "frames" / "c1s1_000001.jpg"

    class Changing(Prw.source_class):
        def photo_size(self, name):
            if name.startswith("c3"):
                path.touch()
            return super().photo_size(name)

    class ChangingPrw(Prw):
        source_class = Changing

    prw = ChangingPrw(root=root, data_dir=root / "prepared", max_pixels=10**6)
    with pytest.raises(UserError, match="found photos that changed while they were prepared"):
        prw.prepare()
    assert not list(root.rglob("dataset_info.json"))
    assert not list(root.rglob("incomplete.*"))


def _write_coco(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    train = fixtures.coco(sizes, [(name, (5, 6, 30, 20), 0) for name in sizes])
    fixtures.write_json(root / "train.json", train)
    fixtures.write_json(root / "test.json", train)


def test_png_and_gray_photos(tmp_path):
    encoded = fixtures.write_photo(tmp_path / "images" / "a.png", 40, 30)
    gray = cv2.imencode(".jpg", np.full((20, 50), 77, np.uint8))[1].tobytes()
    (tmp_path / "images" / "b.jpg").write_bytes(gray)
    _write_coco(tmp_path, {"a.png": (40, 30), "b.jpg": (20, 50)})
    split = datasets.prepare(fixtures.data_config("coco_person_search", tmp_path)).train
    assert list(split.jpegs) == [encoded, gray]
    assert split.sizes.tolist() == [[40, 30], [20, 50]]
    np.testing.assert_array_equal(split.annotations.boxes[1], [[5, 6, 35, 20]])
    (tmp_path / "images" / "a.png").write_bytes(encoded[:-30])
    data = fixtures.data_config("coco_person_search", tmp_path, tmp_path / "other")
    with pytest.raises(UserError, match=r"a.png: cannot be decoded"):
        datasets.prepare(data)


def test_sizes_are_those_of_the_stored_pixels(tmp_path):
    """A photo that its EXIF tag turns by 90 degrees; the annotations must not."""
    encoded = fixtures.write_photo(tmp_path / "images" / "a.jpg", 40, 30)
    orientation = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(orientation) + 2).to_bytes(2, "big") + orientation
    turned = encoded[:2] + segment + encoded[2:]
    shown = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (30, 40, 3)
    (tmp_path / "images" / "a.jpg").write_bytes(turned)
    fixtures.write_photo(tmp_path / "images" / "b.jpg", 40, 30)
    data = fixtures.data_config("coco_person_search", tmp_path)
    _write_coco(tmp_path, {"a.jpg": (30, 40), "b.jpg": (40, 30)})
    with pytest.raises(
        UserError, match=r"a.jpg: is 40x30 pixels .*EXIF.*expected 30x40 as annotated"
    ):
        datasets.prepare(data)
    _write_coco(tmp_path, {"a.jpg": (40, 30), "b.jpg": (40, 30)})
    split = datasets.prepare(data).train
    assert split.sizes.tolist() == [[40, 30], [40, 30]]
    image = photo_of(split, 0)
    assert image.shape == (40, 30, 3)


def test_synthetic_is_written_first_and_read_as_cuhk_sysu(tmp_path, capsys):
    data = fixtures.data_config("synthetic", tmp_path / "synthetic")
    shape = {"train_images": 24, "test_images": 55, "train_identities": 8, "test_identities": 9}
    data.synthetic.update(shape | {"height": 64, "width": 96})
    prepared = datasets.prepare(data)
    assert prepared.train.annotations.num_identities == 8
    assert prepared.test.annotations.num_identities == 9
    assert (prepared.train.sizes == [64, 96]).all()
    protocol, everything = datasets.load_test(data, ())[1]
    assert (protocol.name, everything.name) == ("TestG50", "all")
    assert len(protocol.gallery[0]) == 50
    capsys.readouterr()
    datasets.prepare(data)
    assert capsys.readouterr().out.startswith("synthetic: 24 train and 55 test images in ")


def test_protocols_by_name(root):
    data = fixtures.data_config("prw", root)
    annotations, protocols = datasets.load_test(data, ())
    assert annotations.names == tuple(f"{name}.jpg" for name in TEST)
    assert [protocol.name for protocol in protocols] == ["all", "cross_camera"]
    for names in (("all",), ("cross_camera", "all")):
        protocols = datasets.load_test(data, names)[1]
        assert tuple(protocol.name for protocol in protocols) == names
    with pytest.raises(UserError, match="did you mean 'cross_camera'"):
        datasets.load_test(data, ("crosscamera",))


def test_people_are_evaluated_as_published_not_clipped_to_the_photo(tmp_path):
    people = {"c1s1_000004": [(5, 50, 20, 400, 20)], "c3s1_000005": [(5, 11, 21, 31, 21)]}
    fixtures.write_prw(tmp_path, TRAIN, people, [(5, 50, 20, 400, 20, "c1s1_000004")])
    annotations, _ = datasets.load_test(fixtures.data_config("prw", tmp_path), ())
    np.testing.assert_array_equal(annotations.boxes[0], [[50, 20, 450, 40]])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real PRW slice is not here")
def test_real_slice_of_prw(tmp_path):
    source = SHARED / "prw_sample"
    prepared = datasets.prepare(fixtures.data_config("prw", source, tmp_path))
    assert (prepared.train.sizes == [1080, 1920]).all()
    frame = source / "frames" / prepared.test.annotations.names[5]
    assert prepared.test.jpegs[5] == frame.read_bytes()
