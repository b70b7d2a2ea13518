"""The page by its requests: from a photo to its people, to results, to marks."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import struct
import time
import zipfile

import httpx
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import Calibration
from alignps_jax.gallery.page.site import Site
from alignps_jax.media import decode_photo
from tests.gallery.page_server import (
    color_of,
    line_of,
    painted_site,
    people,
    results,
    upload,
    uploaded,
    visitor,
)
from tests.gallery.painted import (
    BLUE,
    GREEN,
    RED,
    ColorDetector,
    encoded,
    gallery_of,
    painted,
    scenes_of,
)


def test_views_are_combined_by_their_mean_or_their_best(client, site):
    everybody = [p for s in scenes_of(site) for p in site.gallery.people_of(s.id)]
    of = {color: [p for p in everybody if color_of(site, p.id) == color] for color in (RED, GREEN)}
    views = [of[RED][0].id, of[GREEN][0].id]
    embeddings = site.gallery.embeddings([p.id for p in everybody])
    queries = site.gallery.embeddings(views)
    mean = queries.mean(0) / np.linalg.norm(queries.mean(0))
    expected = {"mean": embeddings @ mean, "best": (embeddings @ queries.T).max(1)}
    for combine, similarity in expected.items():
        found = client.get("/search", params={"view": views, "combine": combine})
        photos = {view.partition("-")[0] for view in views}
        pairs = zip(everybody, similarity, strict=True)
        oracle = {p.id: s for p, s in pairs if p.scene.id not in photos}
        assert {person: s for s, person in results(found)} == pytest.approx(oracle, abs=2e-3)
        assert f"by the {combine} of the views" in found.text


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"camera": "yard"}, 5),
        ({"camera": ["yard", "gate"]}, 9),
        ({"folder": "{photos}/gate"}, 4),
        ({"folder": "{photos}"}, 9),
        ({"after": "2026-05-01T05:00:00"}, 5),
        ({"before": "2026-05-01T04:30:00", "camera": "gate"}, 4),
        ({"score": "0.95"}, 0),
        ({"kind": "video"}, 0),
        ({"kind": "photo"}, 9),
        ({"folder": "/etc"}, 0),
        ({"folder": "../../etc"}, 0),
        ({"similarity": "0.99"}, 4),
    ],
)
def test_filters_are_in_the_address(client, site, folder, fields, count):
    fields = {
        name: value.format(photos=(folder / "photos").resolve()) if name == "folder" else value
        for name, value in fields.items()
    }
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    query = httpx.URL(people(page)[0])
    found = client.get(query.copy_merge_params(fields))
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
        ({"before": "0001-01-01"}, 400, "before: "),
        ({"score": "nan"}, 400, "score: "),
        ({"score": "1e9"}, 400, "score: "),
        ({"kind": "paintings"}, 400, "kind: "),
        ({"combine": "worst"}, 400, "combine: "),
        ({"view": [str(n) for n in range(25)]}, 400, "view: "),
        ({"view": "0" * 24 + "-1x2x3x4"}, 404, "not here any more"),
        ({"view": "nobody' OR 1=1 --"}, 404, "not here any more"),
    ],
)
def test_a_wrong_address_is_one_line_that_keeps_the_query(client, fields, status, line):
    answer = client.get("/search", params={"view": "a", "camera": "yard"} | fields)
    assert answer.status_code == status
    assert line in line_of(answer)
    if "view" not in fields:
        assert "/search?view=a&amp;camera=yard" in answer.text
    assert "camera=yard" in answer.text


def test_results_come_page_by_page(client, site):
    view = site.gallery.people_of(next(s.id for s in scenes_of(site) if "a.png" in s.path))[0]
    fields = {"view": view.id}
    whole = results(client.get("/search", params=fields))
    assert results(client.get("/search", params=fields | {"offset": 3})) == whole[3:]
    for offset in (-1, 10**99, "x"):
        assert client.get("/search", params=fields | {"offset": offset}).status_code == 400
    for sort in ("time", "camera"):
        found = results(client.get("/search", params=fields | {"sort": sort}))
        assert sorted(found) == sorted(whole)
        scenes = [site.gallery.person(person).scene for _, person in found]
        times = [scene.taken for scene in scenes if sort == "time" or scene.camera == "gate"]
        assert times == sorted(times, reverse=True)
    # People of the same photo are nobody whom one looks for.
    assert view.scene.id not in {person.partition("-")[0] for _, person in whole}


def calibration(power):
    """The probability is a power of the similarity."""
    curve = np.linspace(0, 0.99, 50)
    return Calibration("a set", 9, curve, curve**power, curve, curve, curve)


def test_results_end_where_they_are_not_likely_any_more(tmp_path):
    site = painted_site(tmp_path)
    site.gallery.calibration = calibration(2)
    client = visitor(site)
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    found = client.get(people(page)[0])
    likely = results(found)
    assert 4 <= len(likely) < 9
    assert "very likely the same person" in found.text
    everybody = re.search(r'href="(/search[^"]+)">Show all', found.text)[1]
    assert len(results(client.get(html.unescape(everybody)))) == 9
    nobody = client.get(uploaded(client, encoded(painted(((210, 210, 120), (10, 10))))))
    assert "nobody in this gallery is likely" in client.get(people(nobody)[0]).text.lower()


def test_friendly_lines_for_photos_that_are_none(client):
    good = encoded(painted((RED, (10, 10))))
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 20_000, 20_000) + b"\x08\x02\0\0\0"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    for photo in (b"", b"not a photo", svg, huge, good[: len(good) // 2]):
        answer = upload(client, photo)
        assert answer.status_code == 400
        assert line_of(answer).startswith("query.png: ")
        assert "Choose another photo" in answer.text
    assert "this is a video" in line_of(upload(client, good, "walk.MP4"))
    page = client.get(uploaded(client, encoded(painted())))
    assert "Nobody was found in this photo" in page.text
    broken = {"Content-Type": "multipart/form-data"}
    for sent in ({"data": {"photo": "text"}}, {"content": b"x", "headers": broken}):
        assert client.post("/upload", **sent).status_code == 400
    many = [("photo", ("a.png", good))] * 2
    assert "one photo at a time" in line_of(client.post("/upload", files=many))


def test_a_photo_of_an_iphone_is_searched_with(client):
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(painted((RED, (10, 10))))).save(out, quality=95)
    page = client.get(upload(client, out.getvalue(), "IMG_1.HEIC").headers["location"])
    assert "Found 1 person" in page.text
    assert results(client.get(people(page)[0]))[0][0] > 0.99


def test_an_empty_gallery_says_so(tmp_path):
    (tmp_path / "photos").mkdir()
    client = visitor(painted_site(tmp_path))
    assert "The gallery is empty" in client.get("/").text
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    assert "The gallery is empty" in client.get(people(page)[0]).text


def test_a_box_finds_who_is_in_it(client, site):
    small = painted((RED, (10, 10)))
    small[150:180, 200:215] = GREEN  # found with a score that is not shown
    place = uploaded(client, encoded(small))
    assert len(people(client.get(place))) == 1
    answer = client.post(f"{place}/box", data={"box": "196,146,220,185"})
    assert answer.status_code == 303
    found = client.get(answer.headers["location"])
    assert color_of(site, results(found)[0][1]) == GREEN
    picture = client.get(re.findall(r'<img src="(/person/[^"]+\.jpg)"', found.text)[0])
    assert picture.headers["content-type"] == "image/jpeg"
    nobody = client.post(f"{place}/box", data={"box": "100,10,110,20"})
    assert "nobody was found" in line_of(nobody)
    for box in ("", "1,2,3", "a,b,c,d", "nan,1,2,3", "9,9,1,1", "1e30,1,1e31,9"):
        assert client.post(f"{place}/box", data={"box": box}).status_code == 400


def test_marks_belong_to_the_person(folder, client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    view = httpx.URL(people(page)[0]).params["view"]
    ranked = [person for _, person in results(client.get("/search", params={"view": view}))]
    right, wrong = ranked[:2], ranked[5]

    def mark(person, said, **query):
        data = {"view": view} | query | {"person": person, "mark": said}
        return client.post("/mark", data=data)

    def pressed(visitor, *views):
        text = visitor.get("/search", params={"view": views}).text
        return re.findall(r'id="((?:right|wrong)-[^"]+)"[^>]*aria-pressed="true"', text)

    assert mark(right[0], "right").status_code == 303
    mark(right[1], "wrong")
    mark(right, "right")
    mark(wrong, "wrong")
    mark(ranked[7], "right")
    mark(ranked[7], "none")
    both = {f"right-{person}" for person in right} | {f"wrong-{wrong}"}
    assert set(pressed(client, view)) == both
    # With another view, from a right result, and on another server they are there, too.
    assert set(pressed(client, view, right[1])) == {f"right-{right[0]}", f"wrong-{wrong}"}
    assert f"wrong-{wrong}" in pressed(client, right[0])
    again = visitor(painted_site(folder))
    again.get(uploaded(again, encoded(painted((RED, (10, 10))))))
    assert set(pressed(again, view)) == both
    lines = client.get("/marks/marks.csv", params={"view": view}).text.splitlines()
    assert sorted(line.rpartition(",")[2] for line in lines[1:]) == ["right", "right", "wrong"]
    coco = client.get("/marks/test.json", params={"view": right[1]})
    assert sorted(one["person_id"] for one in coco.json()["annotations"]) == [-1, 0, 0]
    assert len(client.get("/marks/query.json").json()["annotations"]) == 1
    assert again.post("/marks/forget", data={"view": view}).status_code == 303
    assert pressed(client, view) == []
    for fields in ({"mark": "maybe"}, {"person": "x"}, {"view": ""}):
        data = {"view": view, "person": right[0], "mark": "right"} | fields
        assert client.post("/mark", data=data).status_code in (400, 404)
    assert client.get("/marks/passwd").status_code == 400


def test_a_person_is_forgotten_with_its_marks(tmp_path):
    site = painted_site(tmp_path)
    client = visitor(site)
    first, second, *rest = [p for s in scenes_of(site) for p in site.gallery.people_of(s.id)]
    everybody = {"person": [one.id for one in (second, *rest)], "mark": "right"}
    client.post("/mark", data={"view": first.id} | everybody)
    undone = client.post("/marks/forget", data={"view": first.id}).headers["location"]
    client.post("/mark", data={"view": first.id} | everybody)
    answer = client.post("/forget", data={"person": second.id})
    client.post("/marks/undo", data={"undo": httpx.URL(undone).params["undo"]})
    assert second.scene.path in answer.text
    found = client.get("/search", params={"view": first.id})
    assert second.id not in found.text
    marks = site.marks.about([first.id])
    assert {one.person for one in marks} == {one.id for one in rest}
    assert client.get(f"/person/{second.id}.jpg").status_code == 404
    nobody = {"person": rest[0].id, "what": "nobody"}
    assert client.post("/forget", data=nobody).status_code == 200
    assert site.gallery.num_people == 7
    # Somebody who was missed is added by a box, and found from then on.
    place = f"/scene/{rest[0].scene.id}/person"
    box = ",".join(map(str, rest[0].box))
    assert client.post(place, data={"box": box}).status_code == 303
    assert site.gallery.num_people == 8


def done(client, site):
    """What the page says of work on the gallery when it is done."""
    for _ in range(200):
        if not site.library.is_running:
            break
        time.sleep(0.05)
    return client.get("/library", headers={"Accept": "application/json"}).json()


def test_groups_are_made_named_split_and_merged(tmp_path):
    site = painted_site(tmp_path)
    client = visitor(site)
    assert "Grouping needs to know" in client.get("/people").text
    site.gallery.calibration = calibration(4)
    client.post("/people", data={"change": "make"})
    assert done(client, site)["error"] == ""
    ask = {"Accept": "application/json"}
    groups = client.get("/people", headers=ask).json()["groups"]
    red = max((one["people"] for one in groups), key=len)
    assert {color_of(site, one) for one in red} == {RED}
    place = f"/people/{red[0]}"
    client.post(place, data={"change": "name", "name": "<Ada>"})
    page = client.get(place).text
    assert "All photos of &lt;Ada&gt;" in page
    assert all(f"/person/{one}.jpg" in page for one in red)
    answer = client.post(place, data={"change": "split", "person": red[0]})
    rest = client.get(answer.headers["location"], headers=ask).json()["group"]
    assert (rest["name"], set(rest["people"])) == ("<Ada>", set(red[1:]))
    answer = client.post("/people", data={"change": "merge", "person": [red[1], red[0]]})
    merged = client.get(answer.headers["location"], headers=ask).json()["group"]
    assert (merged["name"], set(merged["people"])) == ("<Ada>", set(red))
    assert client.post("/people", data={"change": "merge", "person": red[0]}).status_code == 400


def test_folders_of_the_server_are_indexed_from_the_page(tmp_path, monkeypatch):
    gallery = painted_site(tmp_path).gallery
    site = Site(gallery, [str(tmp_path / "photos")])
    client = visitor(site)

    def batch(self, images):
        raise UserError("the network is busy")

    monkeypatch.setattr(ColorDetector, "detect_batch", batch)
    monkeypatch.setattr(ColorDetector, "rows", 1, raising=False)
    (tmp_path / "photos" / "late.png").write_bytes(encoded(painted((BLUE, (9, 9)))))
    assert client.post("/library").status_code == 303
    assert "busy" in done(client, site)["error"]
    (tmp_path / "photos" / "late.png").unlink()
    (tmp_path / "photos" / "notes.xmp").write_text("x")
    (tmp_path / "photos" / "half.png").write_bytes(b"half")
    client.post("/library")
    found = done(client, site)
    assert found["done"]["others"] == {".xmp": 1}
    page = client.get("/library").text
    assert "half.png" in page
    assert "8 of 9 files" in page or "9 of 9 files" in page
    assert "without folders" in visitor(Site(gallery)).get("/library").text


def test_photos_of_results_are_downloaded_with_their_boxes(client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    query = httpx.URL(people(page)[0]).params.merge({"similarity": "0.99"})
    with zipfile.ZipFile(io.BytesIO(client.get("/results.zip", params=query).content)) as archive:
        assert archive.testzip() is None
        results = json.loads(archive.read("results.json"))
        assert len(results) == 4
        for one in results:
            image = decode_photo(archive.read(one["file"]), 10**6)
            x1, y1, x2, y2 = map(int, one["box"])
            assert tuple(image[(y1 + y2) // 2, (x1 + x2) // 2]) == RED


def test_every_page_is_an_api(client, site):
    ask = {"Accept": "application/json"}
    cards = client.get("/", headers=ask).json()["cards"]
    assert len(cards) == 7  # two photos have the same content
    answer = upload(client, encoded(painted((RED, (10, 10)))), "x.png")
    found = client.get(answer.headers["location"], headers=ask).json()["found"]
    entries = client.get("/search", params={"view": found[0]["id"]}, headers=ask).json()["entries"]
    assert [round(one["match"]["similarity"], 3) for one in entries[:4]] == [1.0] * 4
    error = client.get("/search", params={"view": "x"}, headers=ask)
    assert (error.status_code, list(error.json())) == (404, ["error"])
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/search", "/upload", "/", "/forget"} <= set(paths)


def test_a_gallery_that_is_gone_is_said_and_found_again(tmp_path):
    site = painted_site(tmp_path)
    client = visitor(site)
    place = tmp_path / "people.lance"
    place.rename(tmp_path / "away")
    site._next = 0
    answer = client.get("/")
    assert answer.status_code == 400
    assert "people.lance" in line_of(answer)
    (tmp_path / "away").rename(place)
    site._next = 0
    page = client.get("/")
    assert page.status_code == 200
    assert "cannot be read" not in page.text
    shutil.rmtree(place)
    gallery_of(tmp_path / "photos" / "yard", place, ColorDetector())
    site._next = 0
    assert "5 people in 3 photos" in client.get("/").text
