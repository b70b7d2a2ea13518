"""COCO-style JSON: a miniature folder with known answers, and what it must refuse."""

from pathlib import Path

import numpy as np
import pytest

from alignps_jax.types import UserError
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from tests.data_pipeline import dataset_fixtures as fixtures

TRAIN = fixtures.coco(
    {"b.jpg": (90, 120), "a.png": (80, 60)},
    [
        ("a.png", (1.5, 2, 10, 20), 3),
        ("b.jpg", (5, 6, 7, 8), -1),
        ("b.jpg", (5, 6, 0, 8), 1),
        ("b.jpg", (-4, 6, 17, 18), 0),
        ("a.png", (30, 2, 10, 20), -2),
    ],
)
TEST = fixtures.coco(
    {"day/t1.jpg": (90, 120), "t2.jpg": (80, 60), "t3.jpg": (80, 60), "t4.jpg": (50, 40)},
    [
        ("t3.jpg", (1, 2, 10, 20), 70),
        ("t2.jpg", (2, 3, 11, 21), 70),
        ("t2.jpg", (20, 3, 11, 21), 70),
        ("t2.jpg", (3, 4, 12, 22), 15),
        ("t4.jpg", (4, 5, 13, 23), 15),
        ("day/t1.jpg", (5, 6, 14, 24), 15),
        ("t4.jpg", (6, 7, 15, 25), 900),
        ("t4.jpg", (7, 8, 16, 26), -1),
    ],
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fixtures.write_json(tmp_path / "train.json", TRAIN)
    fixtures.write_json(tmp_path / "test.json", TEST)
    return tmp_path


def test_training_identities_keep_their_numbers(root):
    train = CocoPersonSearchSource(root).train
    assert train.names == ("b.jpg", "a.png")
    np.testing.assert_array_equal(train.boxes[0], [[5, 6, 12, 14], [-4, 6, 13, 24]])
    np.testing.assert_array_equal(train.boxes[1], [[1.5, 2, 11.5, 22], [30, 2, 40, 22]])
    assert [ids.tolist() for ids in train.identity] == [[-1, 0], [3, -1]]
    assert [mask.tolist() for mask in train.labeled] == [[False, True], [True, False]]
    assert train.num_identities == 4


def test_test_identities_are_renumbered(root):
    test = CocoPersonSearchSource(root).test
    assert [ids.tolist() for ids in test.identity] == [[0], [1, 1, 0], [1], [0, 2, -1]]


def test_without_queries_every_identity_in_two_images_is_asked_for_once(root):
    protocol = CocoPersonSearchSource(root).protocol("all")
    # By the first box in the order of the images; 900 is in a single image.
    assert protocol.query_image.tolist() == [0, 1]
    np.testing.assert_array_equal(protocol.query_box, [[5, 6, 19, 30], [2, 3, 13, 24]])
    assert [images.tolist() for images in protocol.gallery] == [[1, 2, 3], [0, 2, 3]]
    assert [images.tolist() for images in protocol.target_images] == [[1, 3], [2]]
    np.testing.assert_array_equal(protocol.target_boxes[1], [[1, 2, 11, 22]])


def test_given_queries_are_taken_in_their_order(root):
    queries = fixtures.coco(
        {"t4.jpg": (50, 40), "t2.jpg": (80, 60)},
        [
            ("t2.jpg", (20, 3, 11, 21), 70),
            ("t4.jpg", (4, 5, 13, 23), 15),
            ("t2.jpg", (3, 4, 12, 22), 15),
        ],
    )
    fixtures.write_json(root / "query.json", queries)
    protocol = CocoPersonSearchSource(root).protocol("all")
    assert protocol.query_image.tolist() == [3, 1, 1]
    np.testing.assert_array_equal(protocol.query_box[1], [20, 3, 31, 24])
    assert [images.tolist() for images in protocol.target_images] == [[0, 1], [2], [0, 3]]


def test_photos_lie_in_images_or_beside_the_files(root):
    source = CocoPersonSearchSource(root)
    assert source.image_path("day/t1.jpg") == root / "images" / "day" / "t1.jpg"
    fixtures.write_photo(root / "day" / "t1.jpg", 90, 120)
    assert source.image_path("day/t1.jpg") == root / "day" / "t1.jpg"
    fixtures.write_photo(root / "images" / "day" / "t1.jpg", 90, 120)
    assert source.image_path("day/t1.jpg") == root / "images" / "day" / "t1.jpg"
    assert source.photo_size("day/t1.jpg") == (90, 120)


def _changed(part: str, number: int, **fields: object) -> dict[str, list[dict[str, object]]]:
    rows = [dict(row) for row in TRAIN[part]]
    rows[number] |= fields
    return {**TRAIN, part: rows}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list; expected JSON with the lists"),
        ({"images": []}, "has no list 'annotations'"),
        (_changed("annotations", 1, person_id=1.5), r"annotations\[1\].person_id is 1.5; .*whole"),
        (_changed("annotations", 1, person_id=None), r"person_id is None; .*identities out of ra"),
        (_changed("annotations", 2, person_id=True), r"person_id is True"),
        (_changed("annotations", 0, person_id=5), "identities out of range: person_id 5 with 4 an"),
        (_changed("annotations", 3, bbox=[1, 2, 3]), r"annotations\[3\].bbox is \[1, 2, 3\]"),
        (_changed("annotations", 3, bbox=[1, 2, 3, float("nan")]), "bbox is .*nan"),
        (_changed("annotations", 4, image_id=7), r"annotations\[4\] has image_id 7"),
        (_changed("images", 1, width=0), r"images\[1\].width is 0; expected a positive"),
        (_changed("images", 1, id=100), "two images have the same id"),
        (_changed("images", 1, file_name="b.jpg"), "two images of the same name, b.jpg"),
        (_changed("images", 0, file_name=3), r"images\[0\].file_name is 3"),
        (
            _changed("images", 0, file_name="/etc/passwd"),
            "image '/etc/passwd'; .*inside the folder",
        ),
        (_changed("images", 0, file_name="a/../../b.jpg"), "names the image 'a/../../b.jpg'"),
        (_changed("images", 0, file_name="a\0.jpg"), r"names the image 'a\?.jpg'"),
        (_changed("images", 0, file_name="a\nb.jpg"), r"names the image 'a\?b.jpg'"),
        (_changed("images", 0, file_name="\ud800.jpg"), r"names the image '\?.jpg'"),
        (_changed("images", 0, file_name="a" * 9999), r"names the image 'a{120}\.\.\.'"),
        (_changed("annotations", 3, bbox=[1, 2, 3, float("-inf")]), "bbox is .*-inf"),
        (_changed("annotations", 3, bbox=[1, 2, 3, 10**400]), "bbox is .*none beyond 16777216"),
        (_changed("annotations", 3, bbox=[1, 2, 3, -1e300]), "bbox is .*none beyond 16777216"),
        (_changed("annotations", 3, bbox=[1, 2, 3, True]), "bbox is .*True"),
        (_changed("annotations", 3, bbox=["1", 2, 3, 4]), "bbox is .*'1'"),
        (_changed("annotations", 3, bbox={"x": 1}), "bbox is {'x': 1}; expected"),
        (_changed("annotations", 3, bbox=[[[[[[[[9]]]]]]]] * 4), "bbox is .*; expected"),
        (_changed("annotations", 1, image_id=[100]), r"image_id is \[100\]; expected a whole"),
        (_changed("images", 1, id={}), "id is {}; expected a whole number"),
        ({"images": [], "annotations": [3]}, r"annotations\[0\].image_id is None"),
        ({"images": {}, "annotations": []}, "has no list 'images'"),
    ],
)
def test_bad_files_are_refused_in_one_line(root, content, message):
    fixtures.write_json(root / "train.json", content)
    with pytest.raises(UserError, match=rf"train.json: .*{message}") as error:
        _ = CocoPersonSearchSource(root).train
    assert "\n" not in str(error.value)


def test_bad_queries_are_refused(root):
    for people, message in (
        ([("t4.jpg", (4, 5, 13, 23), -1)], "for person_id -1; expected an identity"),
        ([("t4.jpg", (4, 5, 13, 23), 3)], "for person_id 3; expected an identity"),
        ([("t4.jpg", (6, 7, 15, 25), 900)], "annotation 0 is in no other image"),
    ):
        fixtures.write_json(root / "query.json", fixtures.coco({"t4.jpg": (50, 40)}, people))
        with pytest.raises(UserError, match=rf"query.json: .*{message}"):
            CocoPersonSearchSource(root).protocol("all")
    fixtures.write_json(root / "query.json", fixtures.coco({"t9.jpg": (50, 40)}, []))
    with pytest.raises(UserError, match=r"has the image t9.jpg; expected one of test.json"):
        CocoPersonSearchSource(root).protocol("all")


def test_damaged_and_missing_files(root):
    (root / "train.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"train.json: cannot be read \(JSONDecodeError"):
        _ = CocoPersonSearchSource(root).train
    (root / "train.json").unlink()
    with pytest.raises(UserError, match=r"train.json: no such file"):
        CocoPersonSearchSource(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": ' + "[" * 100_000, r"cannot be read \(RecursionError"),
        ('{"images": [' + "9" * 5000 + "]}", "integer string conversion"),
        (b'{"images": "\xff"}', r"cannot be read \(UnicodeDecodeError"),
        ("", r"cannot be read \(JSONDecodeError"),
    ],
)
def test_what_json_should_not_be(root, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (root / "train.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"train.json: .*{message}.*; expected JSON") as error:
        _ = CocoPersonSearchSource(root).train
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_larger_json_is_not_read(root):
    with (root / "train.json").open("r+b") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(UserError, match=r"has 268,435,457 bytes; expected at most 268,435,456"):
        _ = CocoPersonSearchSource(root).train


def test_boxes_without_extent_in_float32_are_dropped(root):
    changed = _changed("annotations", 2, bbox=[1e7, 6, 1e-3, 8])
    fixtures.write_json(root / "train.json", changed)
    assert [len(rows) for rows in CocoPersonSearchSource(root).train.boxes] == [2, 2]


def test_links_do_not_lead_out_of_the_folder(root):
    outside = root.parent / f"{root.name}_outside"
    fixtures.write_photo(outside / "secret.jpg", 90, 120)
    folder = root / "images"
    fixtures.write_photo(folder / "b.jpg", 90, 120)
    (folder / "link.jpg").symlink_to("b.jpg")
    (folder / "out.jpg").symlink_to(outside / "secret.jpg")
    (folder / "day").symlink_to(outside)
    (folder / "circle").symlink_to("circle")
    source = CocoPersonSearchSource(root)
    assert source.image_path("link.jpg") == folder / "link.jpg"
    for name in ("out.jpg", "day/secret.jpg"):
        with pytest.raises(
            UserError, match=rf"{name}: is a link to .*secret.jpg; expected .*inside"
        ):
            source.image_path(name)
    for name in ("circle/a.jpg", "a" * 300):
        with pytest.raises(UserError, match=r"cannot be found \(.*; expected a photo"):
            source.image_path(name)


def test_the_folder_of_the_photos_may_be_a_link(root):
    elsewhere = root.parent / f"{root.name}_disk"
    fixtures.write_photo(elsewhere / "b.jpg", 90, 120)
    (root / "images").symlink_to(elsewhere)
    assert CocoPersonSearchSource(root).image_path("b.jpg") == root / "images" / "b.jpg"


def test_nobody_to_search_for(root):
    lonely = fixtures.coco({"t1.jpg": (9, 9)}, [("t1.jpg", (1, 1, 2, 2), 0)])
    fixtures.write_json(root / "test.json", lonely)
    with pytest.raises(UserError, match="no identity is in two images"):
        CocoPersonSearchSource(root).protocol("all")
