"""What goes into a gallery comes out: lookups, filters, exact and indexed search, notes, export."""

import dataclasses
import datetime
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter, Match, Person, Scene, person_id
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.gallery.people import FileState, People, Table
from alignps_jax.gallery.search import join_seconds
from tests.gallery.painted import Finder, commit, detections, made_up, network_config, write_photos

DIM = 16
DAY = datetime.datetime(2024, 1, 31, 12)
COPIES = {"/copies/1.jpg": "/a/it's b/1.jpg", "/vb/walk.mp4": "/v/walk.mp4"}


def people(count, seed=0):
    rng = np.random.default_rng((count, seed))
    scores = np.sort(rng.uniform(0.3, 1, count))[::-1]
    return detections(rng.uniform(0, 90, (count, 4)), scores, rng.normal(size=(count, DIM)))


def some_scenes():
    """Photos and frames of all kinds, some with nobody; the hash of each is its first path."""
    for number in range(40):
        folder = ("/a", "/a/it's b", "/ab", "/c\n\u00fc")[number % 4]
        taken = DAY + datetime.timedelta(hours=number) if number % 3 else None
        about = people(number % 5, number), taken, ("", "c1", "Canon 'x'")[number % 3]
        yield made_up(f"{folder}/{number}.jpg", *about)
    for number in range(10):
        about = people(1 + number % 2, 99 + number), DAY + datetime.timedelta(seconds=number), "c2"
        yield made_up("/v/walk.mp4", *about, number / 2)


SCENES = sorted(
    some_scenes(),
    key=lambda one: (DAY - (one.scene.taken or datetime.datetime.min), one.scene.path),
)
# (id, scene, box, score, embedding) of each person.
EVERYBODY = [
    (person_id(one.scene.id, box), one.scene, box, float(score), embedding)
    for one in SCENES
    for box, score, embedding, _ in zip(*vars(one.people).values(), strict=True)
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    address = str(tmp_path_factory.mktemp("gallery") / "people.lance")
    gallery = Gallery.open(address, Finder(), create=True)
    commit(gallery, SCENES[:20])
    commit(gallery, SCENES[20:])
    gallery.people.commit([], [FileState(path, 10, 1, of) for path, of in COPIES.items()])
    return address


# Embeddings do not fit.
NO_MEMORY = (psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


def paths_of(scene):
    """Its own path first."""
    return [scene.path, *(copy for copy, of in COPIES.items() if of == scene.path)]


def passes(scene, score, where):
    """Another reading of what a filter says."""
    folder = where.folder and where.folder.rstrip("/") + "/"
    after = where.after and where.after.replace(tzinfo=None)
    return (
        (folder is None or any(path.startswith(folder) for path in paths_of(scene)))
        and (not where.cameras or scene.camera in where.cameras)
        and (after is None or (scene.taken is not None and scene.taken >= after))
        and (where.before is None or (scene.taken is not None and scene.taken <= where.before))
        and (where.min_score is None or (score is not None and score >= where.min_score))
        and (where.kind is None or (where.kind == "video") == (scene.second is not None))
    )


def some_filters():
    rng = random.Random(3)
    choices = {
        "folder": (None, None, "/a", "/a/it's b", "/c\n\u00fc/", "/nothing", "/", "/ab", "/vb"),
        "cameras": ((), (), ("c1",), ("Canon 'x'", "c2"), ("nobody's",)),
        "after": (None, None, DAY, (DAY + datetime.timedelta(hours=20)).astimezone()),
        "before": (None, None, DAY + datetime.timedelta(hours=22)),
        "min_score": (None, None, 0.5, np.float32(0.9)),
        "kind": (None, None, "video", "photo"),
    }
    some = [{name: rng.choice(values) for name, values in choices.items()} for _ in range(60)]
    return [Filter(), *(Filter(**one) for one in some)]


@pytest.mark.parametrize("place", ["in_memory", "on_disk"])
def test_searches_and_lists_are_exact_whatever_the_filter(address, place, monkeypatch):
    if place == "on_disk":
        monkeypatch.setattr(*NO_MEMORY)
    gallery, query = Gallery.open(address), people(1, 77).embeddings[0]
    memory = gallery.memory()
    for where in some_filters():
        found = [
            (float(embedding @ query), name, scene)
            for name, scene, _, score, embedding in EVERYBODY
            if passes(scene, score, where)
        ]
        found.sort(key=lambda one: -one[0])
        assert memory.count(where) == len(found)
        for k in (1, 7, 1000):
            matches = gallery.search(query, k, where)
            assert [(one.person.id, one.person.scene, [*one.paths]) for one in matches] == [
                (name, scene, paths_of(scene)) for _, name, scene in found[:k]
            ]
            similarities = [one.similarity for one in matches]
            np.testing.assert_allclose(similarities, [one for one, *_ in found[:k]], atol=1e-5)
        # Of a video one frame that passes is listed, the newest one.
        cards = {}
        for one in SCENES:
            if passes(one.scene, max(one.people.scores, default=None), where):
                cards.setdefault(one.scene.hash, []).append(one.scene)
        listed = [(one.scene, one.frames) for one in memory.cards(1000, where=where)]
        assert listed == [(frames[0], len(frames)) for frames in cards.values()]
        assert memory.cards(7, 11, where) == memory.cards(1000, where=where)[11:18]


def test_lookups_and_export(address, tmp_path):
    gallery, target = Gallery.open(address), tmp_path / "people.parquet"
    memory, (names, *_, embeddings) = gallery.memory(), zip(*EVERYBODY, strict=True)
    assert gallery.people.export(target) == len(EVERYBODY)
    rows = {row["id"]: row for row in pq.read_table(target).to_pylist()}
    for name, scene, box, score, embedding in EVERYBODY:
        person = memory.person(name)
        assert (person.scene, person.score, person.box.tolist()) == (scene, score, box.tolist())
        expected = {key: vars(scene)[key] for key in ("taken", "camera", "second", "hash")}
        expected |= {"scene": scene.id, "paths": paths_of(scene), "score": score}
        expected |= {"box": box.tolist(), "embedding": embedding.tolist()}
        assert {key: rows[name][key] for key in expected} == expected
    assert [*memory.named(names[::-1])] == [*names[::-1]]
    np.testing.assert_array_equal(gallery.embeddings(names[::-1]), embeddings[::-1])
    for one in SCENES:
        assert memory.scene_of(one.scene.id) == one.scene
        assert [x.score for x in memory.people_of(one.scene.id)] == one.people.scores.tolist()
    assert [one.second for one in memory.scenes_of("/v/walk.mp4")] == [n / 2 for n in range(10)]
    assert memory.scene_of("nothing") is memory.person("'") is None
    assert memory.people_of("nothing") == gallery.search_many(np.ones((0, DIM)), 1) == []


def test_what_cannot_be_is_a_line(tmp_path, address):
    gallery, finder, photo = Gallery.open(address), Finder(), tmp_path / "photo.jpg"
    photo.touch()
    stranger, unsure = Finder(fingerprint="e" * 64), Finder(config=network_config(0.5))
    for call, message in (
        (lambda: Gallery.open(address, stranger), "checkpoint e{12}, .*checkpoint f{12}, "),
        (lambda: Gallery.open(address, unsure), r"threshold 0\.5, .*threshold 0\.285, "),
        (lambda: Gallery.open(tmp_path), "found none in"),
        (lambda: Gallery.open(tmp_path, finder, True), r"found photo\.jpg .* expected a gallery"),
        (lambda: Gallery.open(photo, finder, True), r"--gallery: .*photo\.jpg: "),
        (lambda: gallery.embeddings(["nothing"]), "found nobody with the id 'nothing'"),
        (lambda: gallery.search(np.ones(3), 1), r"found arrays of shapes \(1, 3\)"),
        (lambda: gallery.add([photo]), r"expected Gallery\.open\(\.\.\., detector="),
        (lambda: gallery.people.export(tmp_path / "p.csv"), "expected a file .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_what_a_killed_commit_leaves_can_be_forgotten(gallery, monkeypatch):
    put = Table.put

    def put_some(table, rows):
        left.pop()  # an error when none is left
        put(table, rows)

    monkeypatch.setattr(Table, "put", put_some)
    for count in range(4):
        left = [None] * count
        with pytest.raises(IndexError):
            commit(gallery, [made_up(f"/{count}.jpg", people(2))])
        left = [None] * 9
        forget(gallery.people, [*gallery.people.known_files()])
        assert gallery.people.table.count() == gallery.people.scenes.count() == 0


def test_searches_during_commits_see_one_state(gallery):
    """Each commit adds three people of one direction: a search finds all of them or none."""

    def write():
        for number in range(40):
            three = people(3, number)
            three.embeddings[:] = np.eye(DIM)[number % DIM]
            commit(gallery, [made_up(f"/{number}.jpg", three)])

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        while not done.done():
            assert len(gallery.search(np.eye(DIM)[0], 10**4)) % 3 == 0
            memory = gallery.memory()
            assert len(memory) == 3 * len(memory.scenes)
    assert len(gallery.search(np.eye(DIM)[0], 10**4)) == 120


def test_a_vector_index_says_how_good_it_is_and_is_made_anew(gallery, monkeypatch, tmp_path):
    monkeypatch.setattr(*NO_MEMORY)

    def grow(some):
        commit(gallery, [made_up(f"/{i}.jpg", people(4, i), None, f"c{i}") for i in some])

    def indexed(name):
        write_photos(tmp_path, [name])
        assert gallery.add(str(tmp_path / name)) == {}
        return gallery.people.trained()["people"]

    grow(range(200))
    assert gallery.memory().recall is None
    assert indexed("0.jpg") == (before := len(gallery.memory()))
    assert gallery.memory().recall > 0.8
    grow([999])  # found before the index knows them
    for number, where in ((7, Filter()), (7, Filter(cameras=("c7", "c8"))), (999, Filter())):
        match, *_ = gallery.search(people(4, number).embeddings[2], 5, where)
        assert match.person.scene.path == f"/{number}.jpg"
        assert match.similarity == pytest.approx(1, abs=1e-5)
    assert indexed("1.jpg") == before
    grow(range(200, 400))
    assert indexed("2.jpg") == len(gallery.memory()) >= 2 * before
    gallery.people.purge()  # leaves nothing that was made of people
    assert gallery.people.trained() == {}


def test_two_servers_lose_no_mark(gallery):
    servers = [Marks(People(gallery.address)) for _ in range(2)]
    marks = [Mark("a", str(n), True, 0.5, "a.jpg", id=f"a>{n}") for n in range(20)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda mark: servers[int(mark.person) % 2].put([mark]), marks))
    assert sorted(servers[1].all(), key=marks.index) == marks
    servers[1].put([wrong := dataclasses.replace(marks[1], right=False)])
    assert servers[0].remove(["a"], ["0", "nothing"]) == marks[:1]
    assert sorted(servers[1].all(), key=lambda mark: int(mark.person)) == [wrong, *marks[2:]]


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
        # Two in one frame, one as tall as a child, photos.
        ([seen(1.0, 0, 0.9), seen(1.0, 20, 0.8), seen(2.0, 20, 0.8)], [[0, 2], [1]]),
        ([seen(1.0, 0, 0.9), seen(2.0, 0, 0.9, height=40)], [[0], [1]]),
        ([seen(None, 0, 0.9), seen(None, 0, 0.9, path="/b.jpg")], [[0], [1]]),
        ([seen(1.0, 0, 0.9), seen(2.0, 0, 0.9, path="/w.mp4")], [[0], [1]]),
    ],
)
def test_neighboring_seconds_join_where_similarity_says_so(matches, expected):
    entries = join_seconds(matches)
    assert [[matches.index(one) for one in entry.members] for entry in entries] == expected
    assert [entry.match for entry in entries] == [entry.members[0] for entry in entries]
