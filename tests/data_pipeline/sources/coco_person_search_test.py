"""COCO-style JSON: a miniature folder with known answers, and files as tools write them."""

import json
import unicodedata
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
    # As PowerShell and pandas write.
    text = json.dumps(TEST).replace('"person_id": -1', '"person_id": NaN')
    (tmp_path / "test.json").write_text(text, "utf-16")
    return tmp_path


def train_of(root: Path, part: str = "", *changes: dict[str, object], **others: object):
    """A source whose training file is TRAIN, with changes to the first records of a part."""
    content = {name: [dict(row) for row in rows] for name, rows in TRAIN.items()} | others
    for row, change in zip(content.get(part, []), changes, strict=False):
        row |= change
    fixtures.write_json(root / "train.json", content)
    return CocoPersonSearchSource(root)


def identities(source: CocoPersonSearchSource) -> list[list[int]]:
    return [ids.tolist() for ids in source.train.identity]


def test_images_keep_their_order_and_people_are_renumbered(root):
    source = CocoPersonSearchSource(root)
    train, test = source.train, source.test
    assert train.names == ("b.jpg", "a.png")
    np.testing.assert_array_equal(train.boxes[0], [[5, 6, 12, 14], [-4, 6, 13, 24]])
    np.testing.assert_array_equal(train.boxes[1], [[1.5, 2, 11.5, 22], [30, 2, 40, 22]])
    assert identities(source) == [[-1, 0], [1, -1]]
    assert [mask.tolist() for mask in train.labeled] == [[False, True], [True, False]]
    assert [ids.tolist() for ids in test.identity] == [[0], [1, 1, 0], [1], [0, 2, -1]]
    assert source.photo_size("day/t1.jpg") == (90, 120)
    assert source.notes == [f"{root}/train.json: left out 1 boxes without area"]


def test_without_queries_every_identity_in_two_images_is_asked_for_once(root):
    protocol = CocoPersonSearchSource(root).protocol("all")
    # By the first box in the order of the images; 900 is in a single image.
    assert protocol.query_image.tolist() == [0, 1]
    np.testing.assert_array_equal(protocol.query_box, [[5, 6, 19, 30], [2, 3, 13, 24]])
    assert [images.tolist() for images in protocol.gallery] == [[1, 2, 3], [0, 2, 3]]
    assert [images.tolist() for images in protocol.target_images] == [[1, 3], [2]]
    np.testing.assert_array_equal(protocol.target_boxes[1], [[1, 2, 11, 22]])


def test_given_queries_are_taken_in_their_order_and_the_others_are_listed(root):
    box = (4, 5, 13, 23)
    people = [("t2.jpg", (20, 3, 11, 21), 70), ("t4.jpg", box, 900), ("t4.jpg", box, 15)]
    people += [("t4.jpg", box, 3), ("t9.jpg", box, 15), ("t2.jpg", box, -1), ("t2.jpg", box, 15)]
    sizes = {"t4.jpg": (50, 40), "t2.jpg": (80, 60), "t9.jpg": (9, 9)}
    fixtures.write_json(root / "query.json", fixtures.coco(sizes, people))
    source = CocoPersonSearchSource(root)
    protocol = source.protocol("all")
    assert protocol.query_image.tolist() == [1, 3, 1]
    np.testing.assert_array_equal(protocol.query_box[0], [20, 3, 31, 24])
    assert [images.tolist() for images in protocol.target_images] == [[2], [0, 1], [0, 3]]
    (note,) = (note for note in source.notes if "query.json: 4 records cannot be used" in note)
    for who in ("900 of 't4.jpg'", "3 of 't4.jpg'", "15 of 't9.jpg'", "None of 't2.jpg'"):
        assert f"  {who} is in no other test image" in note
    fixtures.write_json(root / "query.json", fixtures.coco(sizes, people[3:5]))
    with pytest.raises(UserError, match="nobody to search for"):
        CocoPersonSearchSource(root).protocol("all")


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"person_id": "3"}, True),
        ({"person_id": 3.0}, True),
        ({"person_id": 10_000_010_000_000_123}, True),
        ({"person_id": "Müller, blue coat"}, True),
        ({"track_id": 3}, True),
        ({"attributes": {"occluded": False, "track_id": 5, "keyframe": True}}, True),  # CVAT
        ({"attributes": {"occluded": False, "person_id": "3", "track_id": 7}}, True),
        *(({"person_id": nobody}, False) for nobody in ("", "nan", "None", "unknown", -1.0, "-2")),
        ({"attributes": []}, False),
    ],
)
def test_identities_as_tools_write_them(root, fields, known):
    source = train_of(root, "annotations", {"person_id": None} | fields)
    assert identities(source) == [[-1, 0], [1 if known else -1, -1]]


@pytest.mark.parametrize(
    ("image", "same", "sizes"),
    [
        ("7", 7, {"width": "60", "height": "80"}),
        (7.0, "7", {"width": 60.0, "height": 80.0}),
        (10_000_010_000_000_123, "10000010000000123", {}),
        ("a.png", "a.png", {}),
    ],
)
def test_ids_and_sizes_of_images_as_tools_write_them(root, image, same, sizes):
    people = [row | {"image_id": same} for row in TRAIN["annotations"]]
    source = train_of(root, "images", {}, {"id": image} | sizes, annotations=people)
    assert [len(rows) for rows in source.train.boxes] == [0, 4]
    assert source.photo_size("a.png") == (80, 60)


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([{"id": 3, "name": "person"}, {"id": 4, "name": "car"}], [[0], [-1]]),
        ([{"id": 3, "name": "person 12"}, {"id": 4, "name": "dog"}], [[0], [1]]),  # Roboflow
        ([{"id": 3, "name": "al", "supercategory": "person_id"}, {"id": 4}], [[0], [1]]),  # VIA
        ([{"id": 3, "name": "x"}, {"id": 4, "name": "y"}], [[0], [1, -1]]),  # no people
    ],
)
def test_categories_as_tools_write_them(root, categories, expected):
    changes = {"category_id": "4"}, {"iscrowd": 1}, {}, {}, {"category_id": 3.0, "person_id": None}
    source = train_of(root, "annotations", *changes, categories=categories)
    assert identities(source) == expected
    assert "1 crowd regions, 1 boxes without area" in source.notes[0]
    assert ("left out 1 boxes of" in source.notes[0]) == (len(expected[1]) == 1)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"bbox": (50, 70, 100, 88)}, "100% of the boxes leave their photo; is bbox x, y, width"),
        ({"bbox": (0.2, 0.1, 0.3, 0.7)}, "5 boxes are within a pixel; are they fractions of the"),
        ({"person_id": -1, "bbox": (1, 2, 3, 4)}, "nobody has an identity (person_id or track_id"),
    ],
)
def test_what_is_odd_about_all_boxes_is_said(root, fields, note):
    source = train_of(root, "annotations", *[fields] * 5)
    assert sum(map(len, source.train.boxes)) == 5
    assert len(source.notes) == 1
    assert source.notes[0].startswith(f"{root}/train.json: {note}")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("annotations", {"bbox": [1, 2, 3]}, "length 4, got 3 - at `$.bbox`"),
        ("annotations", {"bbox": [1, 2, 3, -1e300]}, "has the coordinate -1e+300"),
        ("annotations", {"bbox": ["nan", 2, 3, 4]}, "has the coordinate nan"),
        ("annotations", {"image_id": 7}, "image_id 7 is none of the usable images"),
        ("annotations", {"person_id": "9" * 5000}, "integer string conversion"),
        ("images", {"file_name": ""}, "names the image '.'; expected a file inside"),
        ("images", {"file_name": "/etc/passwd"}, "'/etc/passwd'; expected a file inside"),
        ("images", {"file_name": "a/../../b.jpg"}, "'a/../../b.jpg'; expected a file inside"),
        ("images", {"file_name": "..\\..\\a.jpg"}, "'../../a.jpg'; expected a file inside"),
        ("images", {"file_name": "C:\\a.jpg"}, "'C:/a.jpg'; expected a file inside"),
        ("images", {"file_name": "a\0.jpg"}, "'a\\x00.jpg'; expected a file inside"),
        ("images", {"file_name": "a.png"}, "or the name 'a.png' of another image"),
    ],
)
def test_records_that_cannot_be_used_are_listed(root, part, fields, message):
    source = train_of(root, part, fields)
    assert 0 < sum(map(len, source.train.boxes)) < 4
    assert "records cannot be used:\n" in source.notes[0]
    assert f"  {part}[{int('a.png' in fields.values())}]: " in source.notes[0]
    assert message in source.notes[0]


def test_ten_bad_records_are_listed_and_the_others_counted(root):
    source = train_of(root, annotations=[*TRAIN["annotations"], *[{"bbox": 3}] * 1234])
    assert sum(map(len, source.train.boxes)) == 4
    first, *lines = source.notes[0].splitlines()
    assert first == f"{root}/train.json: 1,234 records cannot be used:"
    assert (len(lines), lines[-1]) == (11, "  and 1,224 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "Expected `object`, got `array`"),
        (b'{"images": []}', "missing required field `annotations`"),
        (b'{"images": {}, "annotations": []}', r"got `object` - at `\$.images`"),
        (b'{"images": [], "annotations": []}', "holds nothing that can be used"),
        (b'{"images": [', "Expecting value: line 1 column 13"),
        (b"[" * 100_000, "recursion"),
        (  # which of two images is meant nobody knows
            json.dumps(TRAIN).replace('"id": 107', '"id": 100').encode(),
            r"nothing that can be used(.|\n)*has the id 100 or the name 'a.png' of another image",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused(root, content, message):
    (root / "train.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"train.json: .*{message}"):
        _ = CocoPersonSearchSource(root).train


@pytest.mark.parametrize(
    ("file", "name", "photo"),
    [
        ("{}.json", "a.jpg", "images/a.jpg"),
        ("{}.json", "images/a.jpg", "a.jpg"),
        ("{}.json", "a.jpg", "images/{}/a.jpg"),
        ("annotations/instances_{}.json", "f_0.PNG", "images/{}/f_0.PNG"),  # CVAT, a project
        ("{}/annotations/instances_default.json", "f_0.PNG", "{}/images/default/f_0.PNG"),  # tasks
        ("{}/_annotations.coco.json", "a_jpg.rf.0c1.jpg", "{}/a_jpg.rf.0c1.jpg"),  # Roboflow
        ("{}/result.json", "images\\cb-a.png", "{}/images/cb-a.png"),  # Label Studio on Windows
        ("{}/labels.json", "x/a.jpg", "{}/data/x/a.jpg"),  # FiftyOne
    ],
)
def test_layouts_as_tools_write_them(tmp_path, file, name, photo):
    splits = ("Train", "Test") if "instances_{}" in file else ("train", "test")
    for split in splits:
        content = fixtures.coco({name: (8, 9)}, [(name, (1, 2, 3, 4), 0)])
        fixtures.write_json(tmp_path / file.format(split), content)
        fixtures.write_photo(tmp_path / photo.format(split), 8, 9)
    source = CocoPersonSearchSource(tmp_path)
    found = [source.image_path(people.names[0]) for people in (source.train, source.test)]
    assert found == [tmp_path / photo.format(split) for split in splits]


@pytest.mark.parametrize(
    ("name", "photo"),
    [
        ("a.jpg", "a.JPG"),
        (unicodedata.normalize("NFC", "é/ü.jpg"), unicodedata.normalize("NFD", "é/ü.jpg")),
        ("Screenshot 1.02.03\u202fPM.png", "Screenshot 1.02.03\u202fPM.png"),
    ],
)
def test_names_that_are_written_in_another_way_are_found(root, name, photo):
    path = root / "images" / photo
    fixtures.write_photo(path, 8, 9)
    source = train_of(root, "images", {"file_name": name})
    assert source.image_path(source.train.names[0]) == path
    # Nobody knows which of the two is meant.
    fixtures.write_photo(path.with_name(path.name.swapcase()), 8, 9)
    assert CocoPersonSearchSource(root).image_path(name.upper()) == root / "images" / name.upper()


def test_links_are_followed(root):
    outside = root.parent / f"{root.name}_cache"
    fixtures.write_photo(outside / "9f86d081.jpg", 90, 120)
    (root / "images").mkdir()
    (root / "images" / "b.jpg").symlink_to(outside / "9f86d081.jpg")
    (root / "images" / "day").symlink_to(outside)
    (root / "images" / "circle").symlink_to("circle")
    source = CocoPersonSearchSource(root)
    for name in ("b.jpg", "day/9f86d081.jpg"):
        assert source.image_path(name) == root / "images" / name
        assert source.image_path(name).is_file()
    assert source.image_path("circle/a.jpg") == root / "images" / "circle/a.jpg"


def test_photos_of_both_splits_are_counted_and_missing_files_named(root):
    fixtures.write_json(root / "train.json", TEST)
    source = CocoPersonSearchSource(root)
    assert len(source.test.names) == 4
    assert source.notes[-1] == f"{root}: 4 photos are in both splits, train and test"
    (root / "train.json").unlink()
    with pytest.raises(UserError, match=r"lacks train.json, found test.json"):
        CocoPersonSearchSource(root)
