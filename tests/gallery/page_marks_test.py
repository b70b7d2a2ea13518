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
from alignps_jax.gallery.page.marks import Mark, Marked
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from tests.gallery.page_server import color_of, everybody, painted_site
from tests.gallery.painted import BLUE, GREEN, RED, paint_photos


@pytest.fixture
def site(tmp_path):
    """One photo is stored turned by 90 degrees."""
    paint_photos(tmp_path / "photos")
    path, exif = tmp_path / "photos" / "gate" / "e.png", Image.Exif()
    exif[0x0112] = 6
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return painted_site(tmp_path)


def ids(site, color):
    """Everybody of the gallery in that color."""
    return [one.id for one in everybody(site) if color_of(site, one.id) == color]


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
        image = np.asarray(Image.open(root / "images" / name))  # as stored
        for x1, y1, x2, y2 in rows.astype(int):
            (color,) = np.unique(image[y1:y2, x1:x2].reshape(-1, 3), axis=0)
            assert color.max() > color.min()  # a person, while all around is gray


def test_what_is_gone_is_left_out_and_names_are_no_formulas(site):
    red = ids(site, RED)
    marks = [mark(red[0], one) for one in (*red[1:], "y")] + [mark("x", red[2], name="=1+1")]
    Path(site.gallery.memory().person(red[1]).scene.path).unlink()
    marked = Marked(site.gallery, marks)
    assert marked.left_out == 2  # a photo, and somebody who never was
    assert len(json.loads(marked.as_coco())["annotations"]) == len(red) - 1
    *_, row = csv.DictReader(io.StringIO(marked.as_csv().decode()))
    assert (row["view"], row["mark"]) == ("'=1+1", "right")
    alone = Marked(site.gallery, [mark(red[0], "y")])
    for write in (alone.as_query, Marked(site.gallery, [mark("x", "y")]).as_coco):
        with pytest.raises(UserError, match="Nothing to write"):
            write()
