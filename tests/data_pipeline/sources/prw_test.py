"""PRW: a miniature folder with known answers, a literal search, and the real slice."""

from pathlib import Path

import numpy as np
import pytest

from alignps_jax.types import UserError
from data_pipeline.sources.prw import PrwSource
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import SHARED

REAL_SLICE = SHARED / "prw_sample"

TRAIN = {
    "c2s1_000010": [(-2, 10, 20, 30, 40), (932, 50.9, 60, 70.2, 80)],
    "c1s1_000020": [(7, -5, -6, 30, 40), (3, 1, 2, 0, 9)],
    "c6s3_000030": [],
}
TEST = {
    "c1s1_000040": [(41, 10, 20, 30, 40), (6, 50, 60, 70, 80), (-2, 1, 2, 3, 4)],
    "c3s1_000050": [(6, 51, 61, 71, 81), (6, 500, 60, 70, 80)],
    "c1s1_000060": [(41, 11, 21, 31, 41)],
    "c1s1_000070": [(9, 12, 22, 32, 42), (6, 52, 62, 72, 82)],
    "c3s1_000080": [(9, 13, 23, 33, 43)],
}
QUERIES = [
    (6, -50.5, 60, 70.25, 80, "c1s1_000040"),
    (41, 11, 21, 31, 41, "c1s1_000060"),
    (9, 13, 23, 33, 43, "c3s1_000080"),
    (6, 51, 61, 71, 81, "c3s1_000050"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    variables = ("box_new", "anno_file", "anno_previous")
    fixtures.write_prw(tmp_path, TRAIN, TEST, QUERIES, variables)
    path = tmp_path / "query_info.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as an editor on Windows leaves it
    return tmp_path


def test_annotations(root):
    train = PrwSource(root).train
    assert train.names == tuple(f"{name}.jpg" for name in TRAIN)
    # Numbers in the order of the data set's: 3 (its box has no width), 7, 932.
    assert [ids.tolist() for ids in train.identity] == [[-1, 2], [1], []]
    assert [mask.tolist() for mask in train.labeled] == [[False, True], [True], []]
    # x + w is cut after the sum; negative x and y become 0 before it (as published).
    np.testing.assert_array_equal(train.boxes[0], [[10, 20, 40, 60], [50, 60, 121, 140]])
    np.testing.assert_array_equal(train.boxes[1], [[0, 0, 30, 40]])
    assert train.boxes[2].shape == (0, 4)
    assert train.camera.tolist() == [2, 1, 6]
    test = PrwSource(root).test
    assert [ids.tolist() for ids in test.identity] == [[2, 0, -1], [0, 0], [2], [1, 0], [1]]
    protocol = PrwSource(root).protocol("all")
    assert protocol.query_box[0].tolist() == [0, 60, 19, 140]
    assert protocol.query_image.tolist() == [0, 2, 4, 1]


def test_protocols_against_a_literal_search(tmp_path):
    rng = np.random.default_rng(5)
    frames = {}
    for number in range(40):
        people = rng.integers(
            0, 12, rng.integers(1, 6)
        ).tolist()  # some twice: the first box counts
        boxes = rng.integers(1, 300, (len(people), 4)).tolist()
        rows = [(person or -2, *box) for person, box in zip(people, boxes, strict=True)]
        frames[f"c{rng.integers(1, 4)}s1_{number:06d}"] = rows
    # Nobody is asked for whom no other camera saw.
    frames |= {f"c1s1_0001{n:02d}": [(99, 1, 2, 30, 40 + n)] for n in range(2)}
    queries = [(*rows[0], name) for name, rows in frames.items() if rows[0][0] > 0]
    fixtures.write_prw(tmp_path, TRAIN, frames, queries)
    source = PrwSource(tmp_path)
    names = [name.removesuffix(".jpg") for name in source.test.names]
    for searched in ("all", "cross_camera"):
        literal, found = [], []
        for person, x, y, w, h, own in queries:
            gallery = [n for n in frames if n != own and (searched == "all" or n[1] != own[1])]
            targets = [
                (
                    name,
                    next([x, y, x + w, y + h] for who, x, y, w, h in frames[name] if who == person),
                )
                for name in gallery
                if person in [row[0] for row in frames[name]]
            ]
            if targets:
                literal.append((own, [x, y, x + w, y + h], gallery, targets))
        _, *columns = vars(source.protocol(searched)).values()
        for image, box, gallery, images, boxes in zip(*columns, strict=True):
            targets = [(names[i], box.tolist()) for i, box in zip(images, boxes, strict=True)]
            found.append((names[image], box.tolist(), [names[i] for i in gallery], targets))
        assert found == literal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("6 1 2 3 c1s1_000040", "columns changed from 6 to 5 at row 2"),
        ("6 1 2 3 4 c9s1_000040", "'c9s1_000040.jpg' is not among c1s1_000040.jpg, c3s1"),
        ("77 1 2 3 4 c1s1_000040", "'77' is not among 6, 9, 41"),
        ("6 1 2 3 nan c1s1_000040", "has the coordinate nan"),
        ([[1, 1, 2, np.nan, 4]], "has the coordinate nan"),
        ([[1, 1, 2, 3e9, 4]], "has the coordinate 3000000000.0"),
        ([[1, 2, 3, 4]], r"has an array of shape \(1, 4\), not rows of id, x, y, w, h"),
        (["1 2 3 4"], "holds characters where numbers belong"),
    ],
)
def test_errors_name_the_file(root, content, message):
    if isinstance(content, str):
        path = root / "query_info.txt"
        path.write_text(path.read_text().splitlines()[0] + f"\n{content}\n")
    else:
        path = root / "annotations" / "c1s1_000040.jpg.mat"
        fixtures.save(path, "box_new", np.array(content))
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        PrwSource(root).protocol("all")


def test_queries_whose_people_are_in_no_other_photo_are_left_out(tmp_path):
    train = {name: [] for name in [*TRAIN, "c1s1_000060", "c1s1_000070"]}
    queries = [(77, 1, 2, 3, 4, "c1s1_000090"), QUERIES[1]]
    fixtures.write_prw(tmp_path, train, TEST | {"c1s1_000090": [(77, 1, 2, 3, 4)]}, queries)
    source = PrwSource(tmp_path)
    assert source.protocol("all").query_image.tolist() == [2]
    assert source.default_protocols == ("all",)  # both photos are of one camera
    with pytest.raises(UserError, match="nobody to search for: cross_camera"):
        source.protocol("cross_camera")
    assert source.notes == [f"{tmp_path}: 2 photos are in both splits, train and test"]


@pytest.mark.skipif(not REAL_SLICE.is_dir(), reason="the real PRW slice is not here")
def test_real_slice():
    source = PrwSource(REAL_SLICE)
    test = source.test
    assert len(test.names) == 8
    assert test.names[0] == "c1s1_002301.jpg"
    np.testing.assert_array_equal(test.boxes[0][:2], [[1249, 426, 1296, 547], [842, 444, 938, 703]])
    assert test.num_identities == 10
    assert sum(len(rows) for rows in test.boxes) == 31
    protocol = source.protocol("all")
    assert len(protocol.query_image) == 17
    assert protocol.query_box[1].tolist() == [1201, 440, 1453, 1079]
    assert protocol.target_images[1].tolist() == [1, 2]
    assert source.default_protocols == ("all",)
