"""Marks as data: in the pixels as stored, and as the data set reader takes them."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

from PIL import Image

from alignps_jax.files import write_image
from alignps_jax.gallery.page.exports import as_coco, as_csv, as_query, identities
from alignps_jax.gallery.page.marks import (
    Mark,
    Marked,
    Marks,
    Sight,
    sight_of,
)
from alignps_jax.media.photos import read_photo
from alignps_jax.types import UserError
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from tests.gallery.page_server import painted_site
from tests.gallery.painted import BLUE, GREEN, RED, ColorDetector, indexed, painted, scenes_of


@pytest.fixture
def site(tmp_path):
    return painted_site(tmp_path)


def sights(site, color):
    """Everybody of the gallery in that color."""
    found = []
    for scene in scenes_of(site):
        for person in site.gallery.people_of(scene.id):
            x1, y1, x2, y2 = person.box.astype(int)
            pixel = site.gallery.pixels(scene)[(y1 + y2) // 2, (x1 + x2) // 2]
            if tuple(pixel) == color:
                found.append(sight_of(person))
    return found


def test_marks_become_a_data_set(tmp_path, site):
    red, green, (blue,) = (sights(site, color) for color in (RED, GREEN, BLUE))
    marks = site.marks
    for person in red[1:3]:
        marks.set([red[0]], person, 0.9, "right")
    marks.set([red[0]], blue, 0.2, "wrong")
    marks.set([green[0], green[1]], green[2], 0.8, "right")
    root = tmp_path / "set"
    root.mkdir()
    (root / "train.json").write_bytes(as_coco(marks.all()))
    (root / "test.json").write_bytes(as_coco(marks.all()))
    (root / "query.json").write_bytes(as_query(marks.all()))
    (root / "images").symlink_to(json.loads(as_coco(marks.all()))["info"]["folder"])
    source = CocoPersonSearchSource(root)
    names = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "photos").rglob("*.png")}
    assert set(source.test.names) <= names
    identities_ = np.concatenate(source.test.identity)
    assert sorted(identities_.tolist()) == [-1, 0, 0, 0, 1, 1, 1]
    protocol = source.protocol("all")
    assert len(protocol.query_image) == 2
    boxes = dict(zip(source.test.names, source.test.boxes, strict=True))
    assert sum(map(len, boxes.values())) == 7
    for name, rows in boxes.items():
        image = read_photo(root / "images" / name, 10**6)
        for x1, y1, x2, y2 in rows.astype(int):
            assert len(np.unique(image[y1:y2, x1:x2].reshape(-1, 3), axis=0)) == 1  # a person
    lines = as_csv(marks.all()).decode().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(f"0,{red[0].photo},,")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_pixels_as_stored(tmp_path, orientation):
    path = tmp_path / "turned.jpg"
    stored = painted((RED, (40, 20)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    shown = read_photo(path, 10**6)
    person = indexed(path, shown, ColorDetector())
    (box,) = person.people.boxes
    sight = Sight("a", str(path), None, shown.shape[:2], tuple(map(float, box)), 0.9)
    coco = json.loads(as_coco([Marked((sight,))]))
    (image,) = coco["images"]
    assert (image["height"], image["width"]) == stored.shape[:2]
    (annotation,) = coco["annotations"]
    assert annotation["bbox"] == pytest.approx([40, 20, 30, 80], abs=2)


def test_identities_that_share_somebody_are_one():
    a, b, c, d, e = (Sight(x, f"/{x}.jpg", None, (9, 9), (0, 0, 1, 1), 1) for x in "abcde")
    queries = [Marked((a,)), Marked((b,)), Marked((c,))]
    for marked, person, right in ((queries[0], d, True), (queries[1], e, False)):
        marked.marks[person.id] = mark(person, right)
    assert identities(queries) == {"a": 0, "d": 0, "b": 1, "c": 2}
    queries[2].marks["d"] = mark(d, True)  # c is d, who is a
    queries.append(Marked((b, a)))  # and b is a
    assert set(identities(queries).values()) == {0}
    assert set(identities(queries)) == set("abcd")


def mark(person, right):
    return Mark(person, 0.5, right)


def test_what_cannot_be_a_data_set_is_said(tmp_path, site):
    (blue,), red = sights(site, BLUE), sights(site, RED)
    uploaded = Sight("up.0.0", "query.png", None, (0, 0), (0, 0, 9, 9), 0, uploaded=True)
    frame = Sight("f", "/film.mp4", 2.0, (9, 9), (0, 0, 1, 1), 1)
    with pytest.raises(UserError, match="Nothing in a photo"):
        as_coco([Marked((uploaded,), {"f": mark(frame, True)})])
    with pytest.raises(UserError, match="two photos"):
        as_query([Marked((uploaded,), {blue.id: mark(blue, True)})])
    both = Marked((uploaded,), {one.id: mark(one, True) for one in red[:2]})
    assert len(json.loads(as_query([both]))["annotations"]) == 1  # a result asks for the others
    gone = Sight("g", str(tmp_path / "gone.png"), None, (9, 9), (0, 0, 1, 1), 1)
    with pytest.raises(UserError, match=r"gone\.png: cannot be read any more"):
        as_coco([Marked((gone,))])


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path, site):
    red = sights(site, RED)
    write_image(tmp_path / "x.png", painted())
    marks = Marks(tmp_path / "folder" / "marks.json")
    marks.set([red[0]], red[1], 0.9, "right")
    marks.file.unlink()
    marks.file.mkdir()
    with pytest.raises(OSError, match=r"marks\.json"):
        marks.set([red[0]], red[2], 0.9, "right")
    assert marks.of([red[0].id]).marks.keys() == {red[1].id}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"queries": [{}]}',
        '{"queries": 3}',
        '{"queries": [{"views": [], "marks": [{"person": {}, "similarity": 1, "right": true}]}]}',
        "[" * 100_000,
    ],
)
def test_a_file_without_marks_is_refused(tmp_path, text):
    file = tmp_path / "marks.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"marks\.json: found no marks in it"):
        Marks(file)
