"""What goes into a gallery comes out: lookups, filters, exact and indexed search, notes, export."""

from __future__ import annotations

import dataclasses
import datetime
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from alignps_jax.errors import UserError
from alignps_jax.gallery import gallery as galleries
from alignps_jax.gallery.entries import Filter, Match, Person, Scene, person_id, scene_id
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.gallery.people import FileState, FoundScene, People, Table
from alignps_jax.gallery.search import join_seconds, person_in_box
from alignps_jax.types import Detections
from tests.gallery.finder import Finder, stored_bytes

DIM = 16
DAY = datetime.datetime(2024, 1, 31, 12)


def people(count: int, seed: int = 0) -> Detections:
    rng = np.random.default_rng((count, seed))
    embeddings = rng.normal(size=(count, DIM))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = np.sort(rng.uniform(0.3, 1, count))[::-1]
    boxes, valid = rng.uniform(0, 90, (count, 4)), np.ones(count, bool)
    return Detections(*(x.astype(np.float32) for x in (boxes, scores, embeddings)), valid)


def indexed(path, found, second=None, taken=None, camera=""):
    scene = Scene(scene_id(path, second), path, 90, 120, taken, camera, second, path)
    return FoundScene(scene, found)


def some_scenes() -> list[FoundScene]:
    """Photos and frames of all kinds, some with nobody; the hash of each is its first path."""
    found = []
    for number in range(40):
        folder = ("/a", "/a/it's b", "/ab", "/c\n\u00fc")[number % 4]
        taken = DAY + datetime.timedelta(hours=number) if number % 3 else None
        camera = ("", "c1", "Canon 'x'")[number % 3]
        found.append(
            indexed(
                f"{folder}/{number}.jpg", people(number % 5, number), taken=taken, camera=camera
            )
        )
    for number in range(10):
        taken = DAY + datetime.timedelta(seconds=number)
        one = people(1 + number % 2, 100 + number)
        found.append(indexed("/v/walk.mp4", one, number / 2, taken, "c2"))
    return found


COPIES = {"/copies/1.jpg": "/a/it's b/1.jpg", "/vb/walk.mp4": "/v/walk.mp4"}


def commit(gallery, scenes):
    """Stores scenes with the files that they are of."""
    states = {one.scene.path: FileState(one.scene.path, 10, 1, one.scene.path) for one in scenes}
    gallery.people.commit(scenes, list(states.values()))


@pytest.fixture(scope="module")
def scenes():
    return some_scenes()


@pytest.fixture(scope="module")
def address(tmp_path_factory, scenes):
    address = str(tmp_path_factory.mktemp("gallery") / "people.lance")
    gallery = Gallery.open(address, Finder(), create=True)
    commit(gallery, scenes[:20])
    commit(gallery, scenes[20:])
    gallery.people.commit([], [FileState(path, 10, 1, of) for path, of in COPIES.items()])
    return address


@pytest.fixture
def on_disk(monkeypatch):
    """Embeddings do not fit into memory."""
    monkeypatch.setattr(galleries, "fits", lambda people, dim: False)


def passes(one: FoundScene, score: float | None, where: Filter) -> bool:
    """Another reading of what a filter says."""
    scene = one.scene
    paths = [scene.path, *(copy for copy, of in COPIES.items() if of == scene.hash)]
    folder = None if where.folder is None else where.folder.rstrip("/") + "/"
    return (
        (folder is None or any(path.startswith(folder) for path in paths))
        and (not where.cameras or scene.camera in where.cameras)
        and (where.after is None or (scene.taken is not None and scene.taken >= where.after))
        and (where.before is None or (scene.taken is not None and scene.taken <= where.before))
        and (where.min_score is None or (score is not None and score >= where.min_score))
        and (where.kind is None or (where.kind == "video") == (scene.second is not None))
    )


def some_filters() -> list[Filter]:
    rng = random.Random(3)
    choices = {
        "folder": (
            None,
            None,
            "/a",
            "/a/it's b",
            "/c\n\u00fc/",
            "/nothing",
            "/",
            "/ab",
            "/copies",
            "/vb",
        ),
        "cameras": ((), (), ("c1",), ("Canon 'x'", "c2"), ("nobody's",)),
        "after": (None, None, DAY, (DAY + datetime.timedelta(hours=20)).astimezone()),
        "before": (None, None, DAY + datetime.timedelta(hours=22)),
        "min_score": (None, None, 0.5, np.float32(0.9)),
        "kind": (None, None, "video", "photo"),
    }
    return [Filter(**{name: rng.choice(some) for name, some in choices.items()}) for _ in range(60)]


def everybody(scenes):
    """(id, scene, box, score, embedding) of each person."""
    return [
        (person_id(one.scene.id, box), one.scene, box, float(score), embedding)
        for one in scenes
        for box, score, embedding, _ in zip(*vars(one.people).values(), strict=True)
    ]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_searches_are_exact_whatever_the_filter(address, scenes, place, request):
    if place == "disk":
        request.getfixturevalue("on_disk")
    gallery = Gallery.open(address)
    query = people(1, 77).embeddings[0]
    by_path = {one.scene.path: one for one in scenes}
    for where in [Filter(), *some_filters()]:
        plain = dataclasses.replace(where, after=where.after and where.after.replace(tzinfo=None))
        expected = sorted(
            (
                (float(embedding @ query), name, scene)
                for name, scene, _, score, embedding in everybody(scenes)
                if passes(by_path[scene.path], score, plain)
            ),
            key=lambda found: -found[0],
        )
        assert gallery.memory().count(where) == len(expected)
        for k in (1, 7, 1000):
            found = gallery.search(query, k, where)
            assert [match.person.id for match in found] == [name for _, name, _ in expected[:k]]
            assert [match.person.scene for match in found] == [one for _, _, one in expected[:k]]
            similarities = [match.similarity for match in found]
            np.testing.assert_allclose(similarities, [s for s, _, _ in expected[:k]], atol=1e-5)
            for match in found:
                own = match.person.scene.path
                assert match.paths == (own, *(c for c, of in COPIES.items() if of == own))


def test_several_queries_at_once(address, scenes):
    gallery = Gallery.open(address)
    queries = np.array([embedding for *_, embedding in everybody(scenes)])
    found = gallery.search_many(queries, 1)
    assert [matches[0].person.id for matches in found] == [name for name, *_ in everybody(scenes)]
    assert gallery.search_many(queries[:0], 1) == []
    assert len(gallery.search(queries[0], 10**6)) == len(queries) == len(gallery.memory())
    with pytest.raises(UserError, match="gallery search: found arrays of shapes"):
        gallery.search_many(np.ones((1, 3)), 1)


def test_lookups(address, scenes):
    gallery = Gallery.open(address)
    assert len(gallery.memory().scenes) == len(scenes)
    for one in scenes:
        assert gallery.memory().scene_of(one.scene.id) == one.scene
        assert one.scene in gallery.memory().scenes_of(one.scene.hash)
        found = gallery.memory().people_of(one.scene.id)
        assert [person.score for person in found] == one.people.scores.tolist()
        for row, person in enumerate(found):
            assert person.scene == one.scene
            np.testing.assert_array_equal(person.box, one.people.boxes[row])
            again = gallery.memory().person(person.id)
            assert (again.id, again.score) == (person.id, person.score)
        rows = gallery.embeddings([person.id for person in found][::-1])
        np.testing.assert_array_equal(rows, one.people.embeddings[::-1])
    assert gallery.memory().scene_of("nothing") is None
    assert gallery.memory().person("'") is None
    assert gallery.memory().people_of("nothing") == []
    assert [one.second for one in gallery.memory().scenes_of("/v/walk.mp4")] == [
        n / 2 for n in range(10)
    ]
    with pytest.raises(UserError, match="found nobody with the id 'nothing'"):
        gallery.embeddings(["nothing"])


def test_scenes_newest_first_and_one_of_each_video(address, scenes):
    gallery = Gallery.open(address)
    for where in (Filter(), *some_filters()):
        best = {one.scene.id: max(one.people.scores, default=None) for one in scenes}
        plain = dataclasses.replace(where, after=where.after and where.after.replace(tzinfo=None))
        passing = [one.scene for one in scenes if passes(one, best[one.scene.id], plain)]
        passing.sort(key=lambda one: one.path)
        passing.sort(key=lambda one: one.taken or datetime.datetime.min, reverse=True)
        newest = {one.hash: one for one in reversed(passing)}
        expected = [one for one in passing if newest[one.hash] is one]
        found = gallery.memory().cards(1000, where=where)
        assert [card.scene for card in found] == expected
        frames = [sum(other.hash == one.hash for other in passing) for one in expected]
        assert [card.frames for card in found] == frames
        assert gallery.memory().cards(7, 11, where) == found[11:18]


def test_what_is_no_gallery_or_another_ones_is_a_line(tmp_path, address):
    scaled = Finder()
    scaled.config = scaled.config.copy_and_resolve_references()
    with scaled.config.unlocked():
        scaled.config.data.test_scale = (256, 192)
    (tmp_path / "photo.jpg").touch()
    for place, how, message in (
        (address, (Finder(fingerprint="e" * 64),), r"int e{12}, .*checkpoint f{12}, "),
        (address, (scaled, True), r"test_scale 256x192, .*test_scale 128x96"),
        (tmp_path / "nothing", (), "found none in"),
        (tmp_path, (), "found none in"),
        (tmp_path, (Finder(), True), r"found photo.jpg in .*, expected a gallery"),
        (tmp_path / "photo.jpg", (Finder(), True), r"--gallery: .*photo\.jpg: "),
    ):
        with pytest.raises(UserError, match=message):
            Gallery.open(place, *how)
    copy = tmp_path / "copy"
    shutil.copytree(address, copy)
    for file in (copy / "people.lance" / "data").rglob("*.lance"):
        file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))
    with pytest.raises(UserError, match="--gallery: ") as error:
        Gallery.open(copy).search(np.eye(DIM)[0], k=3)
    assert "\n" not in str(error.value)


def test_a_gallery_that_goes_and_comes_back(tmp_path, scenes):
    """A server need not be started again."""
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    commit(gallery, scenes)
    (tmp_path / "g").rename(tmp_path / "away")
    with pytest.raises(UserError, match="--gallery: "):
        gallery.memory().cards(1)
    (tmp_path / "away").rename(tmp_path / "g")
    assert gallery.memory().cards(1)
    shutil.rmtree(tmp_path / "g")
    commit(Gallery.open(tmp_path / "g", Finder(), create=True), scenes[:3])
    assert len(gallery.memory().scenes) == 3


@pytest.mark.parametrize("put", range(4))
def test_what_a_killed_commit_leaves_is_nobody_and_can_be_forgotten(tmp_path, monkeypatch, put):
    gallery, turn, found = Gallery.open(tmp_path / "g", Finder(), create=True), [0], people(2)
    one = indexed("/a.jpg", found)
    known = Table.put

    def killed(table, rows):
        turn[0] += 1
        if turn[0] > put:
            raise KeyboardInterrupt
        known(table, rows)

    monkeypatch.setattr(Table, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        commit(gallery, [one])
    monkeypatch.undo()
    assert not any(state.complete for state in gallery.people.known_files().values())
    assert len(gallery.search(np.eye(DIM)[0], 9)) == (2 if put == 3 else 0)
    if put:
        forget(gallery.people, ["/a.jpg"])
    assert found.embeddings[0].tobytes() not in stored_bytes(gallery.address)
    commit(gallery, [one])
    assert len(gallery.memory()) == len(gallery.search(np.eye(DIM)[0], 9)) == 2


def test_searches_during_commits_see_one_state(tmp_path):
    """Each commit adds three people of one direction: a search finds all of them or none."""
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)

    def write():
        for number in range(40):
            three = people(3, number)
            three.embeddings[:] = np.eye(DIM)[number % DIM]
            commit(gallery, [indexed(f"/{number}.jpg", three)])

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        while not done.done():
            found = gallery.search(np.eye(DIM)[0], 10**4)
            assert len(found) % 3 == 0
            assert len({match.person.id for match in found}) == len(found)
    assert len(gallery.search(np.eye(DIM)[0], 10**4)) == 120


def test_a_vector_index_says_how_good_it_is(tmp_path, on_disk):
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    commit(gallery, [indexed(f"/{i}.jpg", people(4, i), camera=f"c{i}") for i in range(200)])
    assert gallery.memory().recall is None
    gallery.people.train()
    assert gallery.memory().recall > 0.8
    assert gallery.people.trained()["people"] == 800
    query = people(4, 7).embeddings[2]
    for where in (Filter(), Filter(cameras=("c7", "c8"))):
        found = gallery.search(query, 5, where)
        assert found[0].person.scene.path == "/7.jpg"
        assert found[0].similarity == pytest.approx(1, abs=1e-5)
    # People who come later are found before the index knows them.
    commit(gallery, [indexed("/new.jpg", people(1, 999))])
    found = gallery.search(people(1, 999).embeddings[0], 1)
    assert found[0].person.scene.path == "/new.jpg"
    gallery.people.purge()  # leaves no index behind
    assert gallery.people.trained() == {}


def test_two_servers_lose_no_mark(tmp_path):
    Gallery.open(tmp_path / "g", Finder(), create=True)
    servers = [Marks(People(str(tmp_path / "g"))) for _ in range(2)]
    assert servers[0].all() == []
    marks = [Mark("a", f"{turn % 2} {turn}", True, 0.5, "a.jpg") for turn in range(20)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda mark: servers[int(mark.person[0])].put([mark]), marks))
    assert sorted(servers[1].all(), key=marks.index) == marks
    version = servers[1].table.version
    removed = servers[0].remove(["a"], ["1 1", "0 2", "nothing"])
    assert sorted(removed, key=marks.index) == marks[1:3]
    assert servers[1].table.version != version
    assert len(servers[1].all()) == 18
    servers[1].put([dataclasses.replace(marks[1], right=False), marks[2]])
    found = servers[0].all()
    assert [mark.at for mark in found] == sorted(mark.at for mark in found)
    assert [mark.person for mark in found if not mark.right] == ["1 1"]
    assert len(found) == 20


def test_an_exported_gallery_is_read_back(tmp_path, address, scenes):
    count = People(address).export(tmp_path / "people.parquet")
    table = pq.read_table(tmp_path / "people.parquet")
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == count == table.num_rows
    for name, scene, box, score, embedding in everybody(scenes):
        row = rows.pop(name)
        expected = {"scene": scene.id, "score": score, "paths": [scene.path]}
        expected["paths"] += [copy for copy, of in COPIES.items() if of == scene.path]
        expected |= {key: vars(scene)[key] for key in ("taken", "camera", "second", "hash")}
        assert {key: row[key] for key in expected} == expected
        assert row["embedding"] == embedding.tolist()
        assert row["box"] == box.tolist()
    assert not rows
    with pytest.raises(UserError, match=r"--target: found .*\.csv, expected a file \.parquet"):
        People(address).export(tmp_path / "people.csv")


def test_an_empty_gallery(tmp_path):
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    assert gallery.search(np.ones(DIM), 5) == []
    assert gallery.search_many(np.ones((2, DIM)), 5, Filter(folder="/a")) == [[], []]
    assert gallery.memory().cards(5) == []
    assert gallery.people.export(tmp_path / "none.parquet") == 0
    assert gallery.people.known_files() == {}


def seen(second, x, similarity, height=80, path="/v.mp4"):
    """Somebody in a frame, or in a photo."""
    scene = Scene(f"{path}{second}", path, 200, 900, None, "", second, path)
    box = np.array([x, 0, x + 30, height], np.float32)
    return Match(Person(f"{path}{second} {x}", scene, box, 0.9), similarity)


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        # The same person in neighboring seconds, and who stands elsewhere.
        ([seen(1.0, 0, 0.9), seen(2.0, 40, 0.8), seen(2.0, 600, 0.7)], [[0, 1], [2]]),
        ([seen(1.0, 0, 0.9), seen(5.0, 0, 0.8), seen(3.0, 0, 0.7)], [[0, 2], [1]]),
        # A crowd that passes: as near, but not as similar.
        ([seen(1.0, 0, 1.0), seen(2.0, 0, 0.56), seen(0.0, 0, 0.2)], [[0], [1], [2]]),
        ([seen(1.0, 0, 0.5), seen(2.0, 0, 0.31), seen(3.0, 0, -0.1)], [[0, 1], [2]]),
        # Two in one frame, one as tall as a child, photos.
        ([seen(1.0, 0, 0.9), seen(1.0, 20, 0.8), seen(2.0, 20, 0.8)], [[0, 2], [1]]),
        ([seen(1.0, 0, 0.9), seen(2.0, 0, 0.9, height=40)], [[0], [1]]),
        ([seen(None, 0, 0.9), seen(None, 0, 0.9, path="/b.jpg")], [[0], [1]]),
        ([seen(1.0, 0, 0.9), seen(2.0, 0, 0.9, path="/w.mp4")], [[0], [1]]),
        ([], []),
    ],
)
def test_neighboring_seconds_join_where_similarity_says_so(matches, expected):
    entries = join_seconds(matches)
    assert [[matches.index(one) for one in entry.members] for entry in entries] == expected
    assert [entry.match for entry in entries] == [entry.members[0] for entry in entries]
    for entry in entries:
        seconds = [one.person.scene.second for one in entry.members]
        span = None if seconds[0] is None else (min(seconds), max(seconds))
        assert entry.seconds == span


def test_a_box_means_who_is_under_it():
    boxes = np.array([[0, 0, 50, 100], [40, 0, 90, 100], [200, 0, 220, 40]], np.float32)
    assert person_in_box(boxes, (2, 5, 52, 95)) == 0
    assert person_in_box(boxes, (45, 0, 90, 100)) == 1
    assert person_in_box(boxes, (49, 0, 200, 400)) is None  # a neighbor's edge
    assert person_in_box(boxes[:0], (0, 0, 10, 10)) is None


def test_a_large_gallery_that_grows_is_read_seldom_and_forgets_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(galleries, "QUICKLY_READ", 0)
    monkeypatch.setattr(galleries, "PATIENCE", 1e9)
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    commit(gallery, [indexed("/1.jpg", people(3))])
    server, remove = Gallery.open(gallery.address), People.remove
    known = server.memory()
    commit(gallery, [indexed("/2.jpg", people(3, 1))])
    assert server.memory() is known
    one = server.search(np.eye(DIM)[0], 1)[0].person

    def remove_late(*given):
        assert server.memory().person(one.id)  # somebody searches meanwhile
        remove(*given)

    monkeypatch.setattr(People, "remove", remove_late)
    forget(gallery.people, persons=[one.id], for_good=False)
    assert server.memory().person(one.id) is None
    assert len(server.memory()) == 5
