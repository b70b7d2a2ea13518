"""Marks as data: in the pixels as stored, and as the data set reader takes them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignps_jax.errors import UserError
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.marks import Mark, Marked, identities
from alignps_jax.media import read_photo
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from tests.gallery.page_server import color_of, painted_site
from tests.gallery.painted import (
    BLUE,
    GREEN,
    RED,
    ColorDetector,
    commit,
    indexed,
    painted,
    scenes_of,
)


@pytest.fixture
def site(tmp_path):
    return painted_site(tmp_path)


def ids(site, color):
    """Everybody of the gallery in that color."""
    people = [one for scene in scenes_of(site) for one in site.gallery.people_of(scene.id)]
    return [one.id for one in people if color_of(site, one.id) == color]


def mark(view, person, right=True, name=""):
    return Mark(view, person, right, 0.5, name)


def test_marks_become_a_data_set(tmp_path, site):
    red, green, (blue,) = (ids(site, color) for color in (RED, GREEN, BLUE))
    marks = [mark(red[0], red[1]), mark(red[0], red[2]), mark(red[0], blue, right=False)]
    marked = Marked(site.gallery, [*marks, mark(green[0], green[2]), mark(green[1], green[2])])
    root = tmp_path / "set"
    root.mkdir()
    (root / "train.json").write_bytes(marked.as_coco())
    (root / "test.json").write_bytes(marked.as_coco())
    (root / "query.json").write_bytes(marked.as_query())
    (root / "images").symlink_to(json.loads(marked.as_coco())["info"]["folder"])
    source = CocoPersonSearchSource(root)
    names = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "photos").rglob("*.png")}
    assert set(source.test.names) <= names
    numbers = np.concatenate(source.test.identity)
    assert sorted(numbers.tolist()) == [-1, 0, 0, 0, 1, 1, 1]
    assert len(source.protocol("all").query_image) == 2
    boxes = dict(zip(source.test.names, source.test.boxes, strict=True))
    assert sum(map(len, boxes.values())) == 7
    for name, rows in boxes.items():
        image = read_photo(root / "images" / name, 10**6)
        for x1, y1, x2, y2 in rows.astype(int):
            assert len(np.unique(image[y1:y2, x1:x2].reshape(-1, 3), axis=0)) == 1  # a person


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_pixels_as_stored(tmp_path, orientation):
    path, stored = tmp_path / "turned.jpg", painted((RED, (40, 20)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    detector = ColorDetector()
    gallery = Gallery.open(tmp_path / "people.lance", detector, create=True)
    found = indexed(path, read_photo(path, 10**6), detector)
    commit(gallery, [found])
    (person,) = gallery.people_of(found.scene.id)
    coco = json.loads(Marked(gallery, [mark("up.0.0", person.id)]).as_coco())
    (image,) = coco["images"]
    assert (image["height"], image["width"]) == stored.shape[:2]
    (annotation,) = coco["annotations"]
    assert annotation["bbox"] == pytest.approx([40, 20, 30, 80], abs=2)


def test_identities_that_share_somebody_are_one():
    marks = [mark("a", "d"), mark("b", "e", right=False), mark("c", "d", right=False)]
    assert sorted(map(sorted, identities(marks))) == [["a", "d"], ["b"], ["c"]]
    marks.append(mark("c", "d"))  # c is d, who is a
    assert sorted(map(sorted, identities(marks))) == [["a", "c", "d"], ["b"]]
    assert sorted(map(sorted, identities(marks, [{"a", "b"}]))) == [["a", "b", "c", "d"]]


def test_what_is_gone_is_left_out_and_counted(site):
    red = ids(site, RED)
    gone = Path(site.gallery.person(red[1]).scene.path)
    marks = [mark(red[0], one) for one in red[1:]] + [mark("x", "y", name="=1+1.png")]
    gone.unlink()
    marked = Marked(site.gallery, marks)
    assert marked.left_out == 2  # a photo, and somebody who never was
    assert len(json.loads(marked.as_coco())["annotations"]) == len(red) - 1
    alone = Marked(site.gallery, [mark(red[0], "y")])
    for write in (alone.as_query, Marked(site.gallery, [mark("x", "y")]).as_coco):
        with pytest.raises(UserError, match="Nothing to write"):
            write()


def test_names_in_a_table_are_no_formulas(site):
    (blue,) = ids(site, BLUE)
    table = Marked(site.gallery, [mark("up.0.0", blue, name="=1+1.png")]).as_csv().decode()
    (row,) = csv.DictReader(io.StringIO(table))
    assert row["view"] == "'=1+1.png"
    assert row["mark"] == "right"
