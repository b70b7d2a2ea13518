"""The page by its requests: from a photo to its people, to results, to marks."""

from __future__ import annotations

import html
import re
import struct

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

import httpx

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
from tests.gallery.painted import BLUE, GREEN, RED, encoded, painted


def test_from_a_photo_to_its_people_to_their_results(client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10)), (GREEN, (90, 40))))))
    assert "Found 2 people" in page.text
    assert len(people(page)) == 2
    colors = {}
    for address in people(page):
        found = results(client.get(address))
        assert len(found) == 9  # everybody
        assert found == sorted(found, key=lambda one: -one[0])
        same = {color_of(site, person) for similarity, person in found if similarity == 1}
        (color,) = same
        colors[color] = sum(similarity == 1 for similarity, _ in found)
    assert colors == {RED: 4, GREEN: 3}


def test_a_result_leads_to_its_scene_and_to_a_search_from_there(client, site):
    page = client.get(uploaded(client, encoded(painted((BLUE, (10, 10))))))
    (best, *_), query = results(client.get(people(page)[0])), people(page)[0]
    assert best[0] == 1
    person = site.gallery.person(best[1])
    scene = client.get(f"/scene/{person.scene.id}", params={"person": person.id})
    assert scene.text.count('class="chosen"') == 2  # in the photo and in the list
    assert "c d.png" in scene.text
    again = client.get("/search", params={"view": person.id})
    assert person.id not in [one for _, one in results(again)]  # not the query itself
    assert "Searched 9 people" in again.text
    assert query.startswith("/search?view=up.")


def test_views_are_combined_by_their_mean_or_their_best(client, site):
    everybody = [p for s in site.gallery.scenes(99) for p in site.gallery.people(s.id)]
    of = {color: [p for p in everybody if color_of(site, p.id) == color] for color in (RED, GREEN)}
    views = [of[RED][0].id, of[GREEN][0].id]
    embeddings = site.gallery.embeddings([p.id for p in everybody])
    queries = site.gallery.embeddings(views)
    mean = queries.mean(0) / np.linalg.norm(queries.mean(0))
    expected = {"mean": embeddings @ mean, "best": (embeddings @ queries.T).max(1)}
    for combine, similarity in expected.items():
        found = client.get("/search", params={"view": views, "combine": combine})
        oracle = {p.id: s for p, s in zip(everybody, similarity, strict=True) if p.id not in views}
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
        ({"kind": "videos"}, 0),
        ({"kind": "photos"}, 9),
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
    if not count:
        assert "Nobody passes this filter" in found.text
    # Whatever leads on keeps the filter.
    for address in re.findall(r'href="(/search\?view=[^"]+)">Search from here', found.text):
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
        ({"view": [str(n) for n in range(13)]}, 400, "view: "),
        ({"view": "up.000000000000000000000000.0"}, 404, "does not have this photo any more"),
        ({"view": "nobody' OR 1=1 --"}, 404, "not in the gallery"),
    ],
)
def test_a_wrong_address_is_one_line_that_keeps_the_query(client, fields, status, line):
    answer = client.get("/search", params={"view": "a", "camera": "yard"} | fields)
    assert answer.status_code == status
    assert line in line_of(answer)
    if "view" not in fields:
        assert "/search?view=a&amp;camera=yard" in answer.text
    assert "camera=yard" in answer.text


def test_results_come_page_by_page(client, site, monkeypatch, tmp_path):
    view = site.gallery.people(next(s.id for s in site.gallery.scenes(9) if "a.png" in s.path))[0]
    whole = results(client.get("/search", params={"view": view.id}))
    rest = client.get("/results", params={"view": view.id, "offset": 3})
    assert results(rest) == whole[3:]
    assert "<html" not in rest.text
    for offset in (-1, 10**9):
        assert client.get("/results", params={"view": view.id, "offset": offset}).status_code == 400
    assert client.get("/results", params={"view": view.id, "offset": "x"}).status_code == 400


def test_friendly_lines_for_photos_that_are_none(client):
    good = encoded(painted((RED, (10, 10))))
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 20_000, 20_000) + b"\x08\x02\0\0\0"
    for photo, line in (
        (b"", "this file is empty"),
        (b"not a photo", "this is not a photo"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "this is not a photo"),
        (huge, "20000x20000 pixels are too many"),
    ):
        answer = upload(client, photo)
        assert answer.status_code == 400
        assert line in line_of(answer)
    answer = client.get(uploaded(client, good[: len(good) // 2]))
    assert "cannot be decoded" in answer.text
    assert "Choose another photo" in answer.text
    page = client.get(uploaded(client, encoded(painted())))
    assert "Nobody was found in this photo" in page.text
    assert client.post("/upload", data={"photo": "text"}).status_code == 415
    assert client.post("/upload", content=b"{}").status_code == 415
    broken = {"Content-Type": "multipart/form-data"}
    assert client.post("/upload", content=b"x", headers=broken).status_code == 400
    many = [("photo", ("a.png", good))] * 2
    assert "one photo at a time" in line_of(client.post("/upload", files=many))


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
    picture = client.get(re.findall(r'<img src="(/upload/[^"]+\.jpg)"', found.text)[0])
    assert picture.headers["content-type"] == "image/jpeg"
    nobody = client.post(f"{place}/box", data={"box": "100,10,110,20"})
    assert "Nobody was found in this box" in line_of(nobody)
    for box in ("", "1,2,3", "a,b,c,d", "nan,1,2,3", "9,9,1,1", "1e30,1,1e31,9"):
        assert client.post(f"{place}/box", data={"box": box}).status_code == 400


def test_a_box_in_a_photo_of_the_gallery(client, site):
    scene = next(s for s in site.gallery.scenes(9) if s.path.endswith("yard/a.png"))
    green = client.post(f"/scene/{scene.id}/box", data={"box": "195,80,240,170"})
    assert color_of(site, results(client.get(green.headers["location"]))[0][1]) == GREEN
    # Nobody of the gallery is there, so the photo is searched once more, and in vain.
    empty = client.post(f"/scene/{scene.id}/box", data={"box": "100,10,110,20"})
    assert "Nobody was found in this box" in line_of(client.get(empty.headers["location"]))


def test_marks_are_kept_and_downloaded(folder, client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    query = httpx.URL(people(page)[0]).params
    ranked = [person for _, person in results(client.get("/search", params=query))]
    right, wrong = ranked[:2], ranked[5]
    for person, mark in (
        (right[0], "right"),
        (right[1], "wrong"),
        (right[1], "right"),
        (wrong, "wrong"),
        (ranked[7], "right"),
        (ranked[7], "none"),
    ):
        answer = client.post("/mark", data={"view": query["view"], "person": person, "mark": mark})
        assert answer.status_code == 303
    lines = client.get("/marks/marks.csv", params=query).text.splitlines()
    assert len(lines) == 4
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["right", "right", "wrong"]
    coco = client.get("/marks/test.json", params=query)
    assert "attachment" in coco.headers["content-disposition"]
    assert [one["person_id"] for one in coco.json()["annotations"]] == [0, 0, -1]
    assert len(client.get("/marks/query.json", params=query).json()["annotations"]) == 1
    # Another server finds them again.
    again = visitor(painted_site(folder))
    assert again.get("/marks/marks.csv", params=query).text.splitlines() == lines
    assert "2 right, 1 wrong" in again.get("/marks").text
    assert again.post("/marks/forget", data={"view": query["view"]}).status_code == 303
    assert "Nothing is marked yet" in again.get("/marks").text
    assert again.get("/marks/marks.csv").status_code == 400
    for fields in ({"mark": "maybe"}, {"person": "x"}, {"view": ""}):
        data = {"view": query["view"], "person": right[0], "mark": "right"} | fields
        assert client.post("/mark", data=data).status_code in (400, 404)
    assert client.get("/marks/passwd").status_code == 404
