"""CUHK-SYSU: miniature folders with known answers, and the real TestG100.mat."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from alignps_jax.types import UserError
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import SHARED

REAL_PROTOCOL = SHARED / "TestG100.mat"

# Images of both splits mixed, not in the order of their names.
IMAGES = {
    "s9.jpg": [(10, 20, 30, 40), (300, 100, 20, 50)],
    "s2.jpg": [(5, 6, 7, 8), (50, 60, 0, 80), (1, 2, 250, 90)],
    "s10.jpg": [(11, 12, 13, 14)],
    "s3.jpg": [(20, 30, 40, 50), (100, 30, 40, 50)],
    "s4.jpg": [(21, 31, 41, 51), (21, 31, 41, 51)],
    "s5.jpg": [(22, 32, 42, 52)],
    "s6.jpg": [],
}
POOL = ["s5.jpg", "s3.jpg", "s6.jpg", "s4.jpg"]
TRAIN = {
    "p7": [("s2.jpg", (1, 2, 250, 90)), ("s9.jpg", (300, 100, 20, 50))],
    "p1": [("s10.jpg", (11, 12, 13, 14))],
}
QUERY = (("s3.jpg", (20, 30, 40, 50)), "p30")
OTHER = (("s3.jpg", (100, 30, 40, 50)), "p20")
SMALL = [
    (*QUERY, [("s5.jpg", (22, 32, 42, 52)), ("s6.jpg", None)]),
    (*OTHER, [("s4.jpg", (21, 31, 41, 51)), ("s4.jpg", (21, 31, 41, 51)), ("s5.jpg", None)]),
]
LARGE = [
    (*QUERY, [("s4.jpg", None), ("s5.jpg", (22, 32, 42, 52)), ("s6.jpg", None)]),
    (*OTHER, [("s4.jpg", (21, 31, 41, 51)), ("s6.jpg", None), ("s5.jpg", None)]),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"TestG50": SMALL, "TestG100": LARGE, "Occlusion": SMALL[1:]}
    fixtures.write_cuhk(tmp_path / "dataset", IMAGES, POOL, TRAIN, files)
    return tmp_path / "dataset"


def test_training_split_is_what_the_pool_leaves_with_identities_in_file_order(root):
    train = CuhkSysuSource(root).train
    assert train.names == ("s10.jpg", "s2.jpg", "s9.jpg")
    np.testing.assert_array_equal(train.boxes[0], [[11, 12, 24, 26]])
    # The box without width is gone; corners beyond 255 do not wrap in the file's uint8.
    np.testing.assert_array_equal(train.boxes[1], [[5, 6, 12, 14], [1, 2, 251, 92]])
    np.testing.assert_array_equal(train.boxes[2], [[10, 20, 40, 60], [300, 100, 320, 150]])
    assert [ids.tolist() for ids in train.identity] == [[1], [-1, 0], [-1, 0]]
    assert [mask.tolist() for mask in train.labeled] == [[True], [False, True], [False, True]]
    assert train.num_identities == 2
    assert train.camera.tolist() == [0, 0, 0]
    assert {rows.dtype for rows in train.boxes} == {np.dtype(np.float32)}


def test_test_split_is_the_pool_in_its_order_with_the_people_of_the_queries(root):
    test = CuhkSysuSource(root).test
    assert test.names == tuple(POOL)
    # s6 is empty; of the two equal boxes of s4 the first one is the person (as published).
    assert [ids.tolist() for ids in test.identity] == [[0], [0, 1], [], [1, -1]]
    assert test.boxes[2].shape == (0, 4)


def test_galleries_keep_the_order_and_the_repetitions_of_the_file(root):
    source = CuhkSysuSource(root)
    assert source.protocols == ("TestG50", "TestG100", "all", "occlusion")
    assert source.default_protocols == ("TestG100", "TestG50", "all")
    protocol = source.protocol("TestG50")
    assert protocol.name == "TestG50"
    assert protocol.query_image.tolist() == [1, 1]
    np.testing.assert_array_equal(protocol.query_box, [[20, 30, 60, 80], [100, 30, 140, 80]])
    assert [images.tolist() for images in protocol.gallery] == [[0, 2], [3, 3, 0]]
    assert [images.tolist() for images in protocol.target_images] == [[0], [3, 3]]
    np.testing.assert_array_equal(protocol.target_boxes[1], [[21, 31, 62, 82]] * 2)
    large = source.protocol("TestG100")
    assert [images.tolist() for images in large.gallery] == [[3, 0, 2], [3, 2, 0]]
    assert source.protocol("occlusion").query_box.tolist() == [[100, 30, 140, 80]]
    # The smallest gallery, then the other images without the query's own.
    whole = source.protocol("all")
    assert [images.tolist() for images in whole.gallery] == [[0, 2, 3], [3, 3, 0, 2]]
    assert [images.tolist() for images in whole.target_images] == [[0], [3, 3]]


def test_people_are_named_and_labeled_boxes_may_be_strays(tmp_path):
    queries = [
        (("s3.jpg", (20, 30, 40, 50)), "p30", [("s5.jpg", (22, 32, 42, 52))]),
        (("s5.jpg", (22, 32, 42, 52)), "p30", [("s3.jpg", (20, 30, 40, 50))]),
    ]
    train = {"p1": [("s9.jpg", (1, 2, 3, 4)), ("s10.jpg", (11, 12, 13, 14))]}
    fixtures.write_cuhk(tmp_path, IMAGES, POOL, train, {"TestG50": queries})
    source = CuhkSysuSource(tmp_path)
    assert [ids.tolist() for ids in source.test.identity] == [[0], [0, -1], [], [-1, -1]]
    assert [mask.sum() for mask in source.train.labeled] == [1, 0, 0]
    assert "1 labeled boxes are not in Images.mat" in source.notes[-1]


def img(box: object, name: str = "s1.jpg") -> tuple[str, np.ndarray]:
    boxes = fixtures.structs([{"idlocate": box}])
    return "Img", fixtures.structs([{"imname": name, "nAppear": 1, "box": boxes}])


def query(*gallery: fixtures.Located) -> tuple[str, np.ndarray]:
    asked = fixtures.structs([fixtures.located(QUERY[0]) | {"idname": "p"}])
    entries = fixtures.structs(map(fixtures.located, gallery))
    return "TestG50", fixtures.structs([{"Query": asked, "Gallery": entries}])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pool", ("pool", fixtures.cells(["s7"])), "names the image 's7', which Images.mat lacks"),
        ("pool", ("nose", np.zeros(3)), "'pool' is not among nose"),
        ("Images", img([[1, 2, 3, 4]], "../s1.jpg"), "'../s1.jpg'; expected a file inside"),
        ("Images", img([[1, 2, np.nan, 4]]), "has the coordinate nan"),
        ("Images", img([[1, 2, 3]]), "has 3 numbers for a box, not x, y, w, h"),
        ("Images", img([[1j, 2, 3, 4]]), "holds complex numbers"),
        ("Images", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not"),
        ("Images", b"<!DOCTYPE html><html>Sign in", "is an HTML page, not the file itself"),
        (
            "Images",
            b"MATLAB 7.3 MAT-file, Platform: ".ljust(512),
            "is a MATLAB file of version 7.3",
        ),
        ("Images", b"MATLAB, honestly", "is not a little-endian MATLAB file of version 5"),
        ("test/train_test/TestG50", query(("s5.jpg", None)), "or whom no image shows"),
        ("test/train_test/TestG50", query(("s9.jpg", None)), "'s9.jpg' is not among s5.jpg, s3"),
    ],
)
def test_errors_name_the_file(root, file, content, message):
    path = root / "annotation" / f"{file}.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        fixtures.save(path, *content)
    with pytest.raises(UserError) as error:
        _ = CuhkSysuSource(root).test
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_what_is_missing_is_said(root):
    with pytest.raises(UserError, match=rf"set --config.data.root={root} "):
        CuhkSysuSource(root.parent)
    for path in root.rglob("TestG*.mat"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks annotation/.*TestG\*.mat, found annotation"):
        CuhkSysuSource(root)


@pytest.mark.skipif(not REAL_PROTOCOL.is_file(), reason="the real TestG100.mat is not here")
def test_real_protocol_against_a_literal_reading(tmp_path):
    """2,900 queries over 6,978 images; the folder around the file is made up from it."""
    rows = scipy.io.loadmat(REAL_PROTOCOL, squeeze_me=True)["TestG100"]
    literal, boxes = [], {}
    for row in rows:
        query, gallery = row["Query"], row["Gallery"]
        entries = [(str(query["imname"]), query["idlocate"].item())]
        entries += [(str(name), box) for name, box, _ in gallery]
        literal.append((str(query["idname"]), entries))
        for name, box in entries:
            boxes.setdefault(name, set()).update({tuple(box.tolist())} if box.size else ())
    assert len(boxes) == 6978
    train = [("s0.jpg", (1, 2, 3, 4))]
    fixtures.write_cuhk(tmp_path, boxes | {"s0.jpg": [train[0][1]]}, [*boxes], {"p0": train}, {})
    (tmp_path / "annotation/test/train_test/TestG100.mat").write_bytes(REAL_PROTOCOL.read_bytes())

    source = CuhkSysuSource(tmp_path)
    assert source.protocols == ("TestG100", "all")
    protocol, test = source.protocol("TestG100"), source.test
    assert len(test.names) == 6978
    assert len(protocol.query_image) == len(literal) == 2900
    assert test.num_identities == len({person for person, _ in literal})
    for query, (_, entries) in enumerate(literal):
        names = [name for name, _ in entries]
        held = [(name, box.astype(int)) for name, box in entries if box.size]
        images = [protocol.query_image[query], *protocol.gallery[query]]
        assert [test.names[image] for image in images] == names
        targets = [protocol.query_image[query], *protocol.target_images[query]]
        assert [test.names[image] for image in targets] == [name for name, _ in held]
        corners = [[x, y, x + w, y + h] for _, (x, y, w, h) in held]
        found = [protocol.query_box[query], *protocol.target_boxes[query]]
        np.testing.assert_array_equal(found, corners)
