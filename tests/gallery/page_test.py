"""The page by its requests: from a photo to its people, to results, to marks, and back."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import struct
import zipfile
from urllib.parse import quote

import httpx
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from alignps_jax.gallery.gallery import Gallery
from alignps_jax.media import decode_photo
from tests.gallery.page_server import (
    RED_PHOTO,
    Visitor,
    calibration,
    color_of,
    everybody,
    line_of,
    painted_site,
    people,
    results,
)
from tests.gallery.painted import GREEN, RED, ColorDetector, encoded, gallery_of, painted

JSON = {"Accept": "application/json"}


def test_views_are_combined_by_their_mean_or_their_best(client, site):
    of = {color_of(site, one.id): one for one in everybody(site)}
    views = of[RED], of[GREEN]
    embeddings = site.gallery.embeddings([one.id for one in everybody(site)])
    queries = site.gallery.embeddings([view.id for view in views])
    mean = queries.mean(0) / np.linalg.norm(queries.mean(0))
    expected = {"mean": embeddings @ mean, "best": (embeddings @ queries.T).max(1)}
    for combine, similarity in expected.items():
        query = {"view": [view.id for view in views], "combine": combine}
        found = results(client.get("/search", params=query))
        pairs = zip(everybody(site), similarity, strict=True)
        # People of the same photos are nobody whom one looks for.
        photos = {view.scene.id for view in views}
        oracle = {one.id: share for one, share in pairs if one.scene.id not in photos}
        assert {person: share for share, person in found} == pytest.approx(oracle, abs=2e-3)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"camera": "yard"}, 5),
        ({"camera": ["yard", "gate"]}, 9),
        ({"folder": "{photos}/gate"}, 4),
        ({"after": "2026-05-01T05:00:00"}, 5),
        ({"before": "2026-05-01T04:30:00", "camera": "gate"}, 4),
        ({"score": "0.95"}, 0),
        ({"kind": "video"}, 0),
        ({"folder": "../../etc"}, 0),
        ({"similarity": "0.99"}, 4),
    ],
)
def test_filters_are_in_the_address(client, site, folder, fields, count):
    fields = {
        name: value.format(photos=(folder / "photos").resolve()) if name == "folder" else value
        for name, value in fields.items()
    }
    found = client.get(client.query().copy_merge_params(fields))
    assert len(results(found)) == count
    assert ("Nobody passes this filter" in found.text) is (count == 0)
    # Whatever leads on keeps the filter.
    for address in re.findall(r'href="(/search\?view=[^"]+)">Search<', found.text):
        kept = httpx.URL(html.unescape(address)).params
        for name, value in fields.items():
            assert kept.get_list(name) == ([value] if isinstance(value, str) else value)


@pytest.mark.parametrize(
    ("fields", "status", "line"),
    [
        ({"after": "yesterday"}, 400, "after: "),
        ({"after": "2026-05-01T00:00+01:00"}, 400, "after: "),
        ({"score": "nan"}, 400, "score: "),
        ({"combine": "worst"}, 400, "combine: "),
        ({"view": [str(n) for n in range(25)]}, 400, "view: "),
        ({"view": "0" * 24 + "-1x2x3x4"}, 404, "not here any more"),
    ],
)
def test_a_wrong_address_is_one_line_that_keeps_the_query(client, fields, status, line):
    answer = client.get("/search", params={"view": "a", "camera": "yard"} | fields)
    assert answer.status_code == status
    assert line in line_of(answer)
    if "view" not in fields:
        assert "/search?view=a&amp;camera=yard" in answer.text
    assert "camera=yard" in answer.text


def test_cameras_and_folders_are_offered(site, folder):
    photos = folder / "photos"
    assert site.shown()["cameras"] == ["gate", "yard"]
    own = [*reversed(photos.parents), photos, photos / "gate", photos / "yard"]
    assert site.shown()["folders"] == list(map(str, own))


def test_results_come_page_by_page(client, site):
    person = next(one for one in everybody(site) if one.scene.name == "a.png")
    fields = {"view": person.id}
    whole = results(client.get("/search", params=fields))
    assert results(client.get("/search", params=fields | {"offset": 3})) == whole[3:]
    for sort in ("time", "camera"):
        found = results(client.get("/search", params=fields | {"sort": sort}))
        assert sorted(found) == sorted(whole)
        scenes = [site.gallery.memory().person(person).scene for _, person in found]
        times = [scene.taken for scene in scenes if sort == "time" or scene.camera == "gate"]
        assert times == sorted(times, reverse=True)


def test_results_end_where_they_are_not_likely_any_more(tmp_path):
    site = painted_site(tmp_path)
    site.gallery.calibration = calibration(2)
    client = Visitor(site)
    found = client.get(client.query())
    assert 4 <= len(results(found)) < 9
    assert "very likely the same person" in found.text
    everybody = re.search(r'href="(/search[^"]+)">Show all', found.text)[1]
    assert len(results(client.get(html.unescape(everybody)))) == 9
    nobody = client.query(encoded(painted(((210, 210, 120), (10, 10)))))
    assert "nobody in this gallery is likely" in client.get(nobody).text.lower()


def test_photos_of_all_kinds_and_friendly_lines_for_what_is_none(client):
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 20_000, 20_000) + b"\x08\x02\0\0\0"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    for photo in (b"", b"not a photo", svg, huge, RED_PHOTO[: len(RED_PHOTO) // 2]):
        answer = client.upload(photo)
        assert answer.status_code == 400
        assert line_of(answer).startswith("query.png: ")
        assert "Choose another photo" in answer.text
    heic = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(painted((RED, (10, 10))))).save(heic, quality=95)
    assert results(client.get(client.query(heic.getvalue())))[0][0] > 0.99
    assert "this is a video" in line_of(client.upload(RED_PHOTO, "walk.MP4"))
    page = client.get(client.uploaded(encoded(painted())))
    assert "Nobody was found in this photo" in page.text
    broken = {"Content-Type": "multipart/form-data"}
    for sent in ({"data": {"photo": "text"}}, {"content": b"x", "headers": broken}):
        assert client.post("/upload", **sent).status_code == 400
    many = [("photo", ("a.png", RED_PHOTO))] * 2
    assert "one photo at a time" in line_of(client.post("/upload", files=many))


def test_a_box_finds_who_is_in_it(client, site):
    small = painted((RED, (10, 10)))
    small[150:180, 200:215] = GREEN  # found with a score that is not shown
    place = client.uploaded(encoded(small))
    assert len(people(client.get(place))) == 1
    answer = client.post(f"{place}/box", data={"box": "196,146,220,185"})
    assert answer.status_code == 303
    found = client.get(answer.headers["location"])
    assert color_of(site, results(found)[0][1]) == GREEN
    nobody = client.post(f"{place}/box", data={"box": "100,10,110,20"})
    assert "nobody was found" in line_of(nobody)
    for box in ("", "1,2,3", "a,b,c,d", "nan,1,2,3", "9,9,1,1"):
        assert client.post(f"{place}/box", data={"box": box}).status_code == 400


def test_marks_belong_to_the_person(folder, client, site):
    view = client.query().params["view"]
    ranked = [person for _, person in results(client.get("/search", params={"view": view}))]
    right, wrong = ranked[:2], ranked[5]

    def pressed(client, *views):
        text = client.get("/search", params={"view": views}).text
        return {*re.findall(r'id="((?:right|wrong)-[^"]+)"[^>]*aria-pressed="true"', text)}

    said = ((right[1], "wrong"), (right, "right"), (wrong, "wrong"), (ranked[7], "right"))
    for person, mark in (*said, (ranked[7], "none")):
        data = {"view": view, "person": person, "mark": mark}
        assert client.post("/mark", data=data).status_code == 303
    both = {f"right-{person}" for person in right} | {f"wrong-{wrong}"}
    assert pressed(client, view) == both
    # With another view, from a right result, and on another server they are there, too.
    assert pressed(client, view, right[1]) == {f"right-{right[0]}", f"wrong-{wrong}"}
    assert f"wrong-{wrong}" in pressed(client, right[0])
    again = Visitor(painted_site(folder))
    again.query()
    assert pressed(again, view) == both
    coco = client.get("/marks/test.json", params={"view": right[1]})
    assert sorted(one["person_id"] for one in coco.json()["annotations"]) == [-1, 0, 0]
    assert again.post("/marks/forget", data={"view": view}).status_code == 303
    assert pressed(client, view) == set()
    for fields in ({"mark": "maybe"}, {"person": "x"}, {"view": ""}):
        data = {"view": view, "person": right[0], "mark": "right"} | fields
        assert client.post("/mark", data=data).status_code in (400, 404)


def test_photos_of_results_are_downloaded_with_their_boxes(client, site):
    query = client.query().params.merge({"similarity": "0.99"})
    with zipfile.ZipFile(io.BytesIO(client.get("/results.zip", params=query).content)) as archive:
        assert archive.testzip() is None
        results = json.loads(archive.read("results.json"))
        assert len(results) == 4
        for one in results:
            image = decode_photo(archive.read(one["file"]), 10**6)
            x1, y1, x2, y2 = map(int, one["box"])
            assert tuple(image[(y1 + y2) // 2, (x1 + x2) // 2]) == RED


def test_every_page_is_an_api(client):
    cards = client.get("/", headers=JSON).json()["cards"]
    assert len(cards) == 7  # two photos have the same content
    found = client.get(client.uploaded(), headers=JSON).json()["found"]
    query = {"view": found[0]["id"]}
    entries = client.get("/search", params=query, headers=JSON).json()["entries"]
    assert [round(one["match"]["similarity"], 3) for one in entries[:4]] == [1.0] * 4
    error = client.get("/search", params={"view": "x"}, headers=JSON)
    assert (error.status_code, list(error.json())) == (404, ["error"])
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/search", "/upload", "/", "/forget"} <= set(paths)


def test_a_gallery_that_is_gone_or_empty_says_so_and_is_found_again(tmp_path):
    client = Visitor(painted_site(tmp_path))
    place = tmp_path / "people.lance"
    place.rename(tmp_path / "away")
    assert "people.lance" in line_of(client.get("/"))
    (tmp_path / "away").rename(place)
    page = client.get("/")
    assert page.status_code == 200
    assert "cannot be read" not in page.text
    shutil.rmtree(place)
    gallery_of(tmp_path / "photos" / "yard", place, ColorDetector())  # after as many commits
    assert "5 people in 3 photos" in client.get("/").text
    shutil.rmtree(place)
    Gallery.open(place, ColorDetector(), create=True)
    for path in ("/", client.query()):
        assert "The gallery is empty" in client.get(path).text


ODD = (
    *("nan", "1e999", "-1", "2" * 400, "%00", "\0", "\ufffe", "10,20,60,140"),
    *("1e30,1,1e31,9", "//x", "/etc/passwd", "../../app.py", "x' OR '1'='1"),
)
FIELDS = ("view", "combine", "camera", "after", "score", "offset", "kind", "person", "sort", "next")
POSTS = ("/mark", "/scene/{}/box", "/scene/{}/person", "/people", "/marks/undo", "/forget")


@pytest.mark.parametrize("value", ODD)
def test_odd_values(client, site, value):
    person = everybody(site)[0]
    view, scene, place = person.id, person.scene.id, quote(value, safe="")
    for path in ("/", "/search", f"/scene/{scene}"):
        for name in FIELDS:
            answer = client.get(path, params={"view": view} | {name: value})
            assert answer.status_code < 500
            assert not answer.headers.get("location", "/").startswith(("//", "http"))
    for path in ("scene/{}", "scene/{}/320.jpg", "person/{}.jpg", "marks/{}", "static/{}"):
        assert client.get("/" + path.format(place)).status_code in (400, 404)
    for path in POSTS:
        for name in ("view", "person", "box", "change", "undo"):
            form = {"view": view, "person": "x", "mark": "right", "box": "1,2,3,4"}
            assert client.post(path.format(scene), data=form | {name: value}).status_code < 500
