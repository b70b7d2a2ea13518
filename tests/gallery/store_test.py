"""What goes into a gallery comes out: lookups, filters, exact and indexed search, other formats."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import json
import random
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignps_jax.gallery.entries import FileState, Filter, Scene, scene_id
from alignps_jax.gallery.exporting import export_people
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import ABOUT, About, IndexedScene
from alignps_jax.gallery.writing import (
    KnownFile,
    commit_scenes,
    known_files,
    purge,
    remove_files,
    tidy,
)
from alignps_jax.types import Detections, UserError
from tests.gallery.finder import Finder

DIM = 16
DAY = datetime.datetime(2024, 1, 31, 12)


def people(count: int, seed: int = 0) -> Detections:
    rng = np.random.default_rng((count, seed))
    embeddings = rng.normal(size=(count, DIM))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Detections(
        rng.uniform(0, 90, (count, 4)).astype(np.float32),
        np.sort(rng.uniform(0.3, 1, count))[::-1].astype(np.float32),
        embeddings.astype(np.float32),
        np.ones(count, bool),
    )


def indexed(path, found, second=None, taken=None, camera="", mtime=1, every=None, final=True):
    scene = Scene(scene_id(path, second), path, 90, 120, taken, camera, second)
    return IndexedScene(scene, FileState(10, mtime, "hash"), found, every, final)


def some_scenes() -> list[IndexedScene]:
    """Photos and frames of all kinds, some with nobody."""
    found = []
    for number in range(40):
        folder = ("/a", "/a/it's b", "/ab", "/c\n\u00fc")[number % 4]
        found.append(
            indexed(
                f"{folder}/{number}.jpg",
                people(number % 5, number),
                taken=None if number % 3 == 0 else DAY + datetime.timedelta(hours=number),
                camera=("", "c1", "Canon 'x'")[number % 3],
            )
        )
    for number in range(10):
        taken = DAY + datetime.timedelta(seconds=number)
        one = people(1 + number % 2, 100 + number)
        found.append(indexed("/v/walk.mp4", one, number / 2, taken, "c2", 1, 0.5, number == 9))
    return found


@pytest.fixture(scope="module")
def scenes():
    return some_scenes()


@pytest.fixture(scope="module")
def address(tmp_path_factory, scenes):
    address = str(tmp_path_factory.mktemp("gallery") / "people.lance")
    gallery = Gallery.open(address, create_for=Finder())
    commit_scenes(gallery, scenes[:20])
    commit_scenes(gallery, scenes[20:])
    return address


def passes(one: IndexedScene, row: int, where: Filter) -> bool:
    """Another reading of what a filter says."""
    scene, score = one.scene, one.people.scores[row]
    return (
        (where.folder is None or scene.path.startswith(where.folder.rstrip("/") + "/"))
        and (not where.cameras or scene.camera in where.cameras)
        and (where.after is None or (scene.taken is not None and scene.taken >= where.after))
        and (where.before is None or (scene.taken is not None and scene.taken <= where.before))
        and (where.min_score is None or score >= where.min_score)
        and (where.videos is None or where.videos == (scene.second is not None))
    )


def some_filters() -> list[Filter]:
    rng = random.Random(3)
    choices = {
        "folder": (None, None, "/a", "/a/it's b", "/c\n\u00fc/", "/nothing", "/"),
        "cameras": ((), (), ("c1",), ("Canon 'x'", "c2"), ("nobody's",)),
        "after": (None, None, DAY, DAY + datetime.timedelta(hours=20)),
        "before": (None, None, DAY + datetime.timedelta(hours=22)),
        "min_score": (None, None, 0.5, 0.9),
        "videos": (None, None, True, False),
    }
    return [Filter(**{name: rng.choice(some) for name, some in choices.items()}) for _ in range(40)]


@pytest.mark.parametrize("exact_up_to", [10**6, 0])
def test_searches_are_exact_whatever_the_filter(address, scenes, exact_up_to):
    gallery = Gallery.open(address, exact_up_to=exact_up_to)
    query = people(1, 77).embeddings[0]
    for where in [Filter(), *some_filters()]:
        expected = sorted(
            (
                (float(one.people.embeddings[row] @ query), f"{one.scene.id}-{row}", one.scene)
                for one in scenes
                for row in range(len(one.people.scores))
                if passes(one, row, where)
            ),
            key=lambda found: -found[0],
        )
        for k, offset in ((1, 0), (7, 3), (1000, 0)):
            found = gallery.search(query, k, where, offset)
            wanted = expected[offset : offset + k]
            assert [match.person.id for match in found] == [name for _, name, _ in wanted]
            assert [match.person.scene for match in found] == [scene for _, _, scene in wanted]
            similarities = [match.similarity for match in found]
            np.testing.assert_allclose(similarities, [s for s, _, _ in wanted], atol=1e-5)


def test_several_queries_at_once(address, scenes):
    gallery = Gallery.open(address)
    queries = np.concatenate([one.people.embeddings for one in scenes])
    found = gallery.search(queries, 1)
    ids = [f"{one.scene.id}-{row}" for one in scenes for row in range(len(one.people.scores))]
    assert [matches[0].person.id for matches in found] == ids
    assert gallery.search(queries[:0], 1) == []
    assert len(gallery.search(queries[0], 10**6)) == len(queries) == gallery.num_people


def test_lookups(address, scenes):
    gallery = Gallery.open(address)
    assert gallery.num_scenes == len(scenes)
    for one in scenes:
        assert gallery.scene(one.scene.id) == one.scene
        found = gallery.people(one.scene.id)
        assert [person.score for person in found] == one.people.scores.tolist()
        for row, person in enumerate(found):
            assert person.scene == one.scene
            np.testing.assert_array_equal(person.box, one.people.boxes[row])
            again = gallery.person(person.id)
            assert again is not None
            assert (again.id, again.score) == (person.id, person.score)
        rows = gallery.embeddings([person.id for person in found][::-1])
        np.testing.assert_array_equal(rows, one.people.embeddings[::-1])
    assert gallery.scene("nothing") is None
    assert gallery.person("'") is None
    assert gallery.people("nothing") == []
    nobody = next(one.scene.id for one in scenes if len(one.people.scores) == 0)
    assert gallery.person(f"{nobody}-0") is None
    with pytest.raises(UserError, match="found nobody with the id 'nothing'"):
        gallery.embeddings(["nothing"])


def test_scenes_by_time_then_path(address, scenes):
    gallery = Gallery.open(address)
    late = datetime.datetime.max
    expected = sorted(
        (one.scene for one in scenes),
        key=lambda scene: (scene.taken or late, scene.path, scene.second or 0),
    )
    assert gallery.scenes(1000) == expected
    assert gallery.scenes(7, offset=11) == expected[11:18]
    where = Filter(videos=True, min_score=2.0)
    assert gallery.scenes(1000, where=where) == [one for one in expected if one.second is not None]
    assert gallery.cameras() == ["Canon 'x'", "c1", "c2"]
    assert gallery.folders() == ["/a", "/a/it's b", "/ab", "/c\n\u00fc", "/v"]


def test_wrong_searches(address):
    gallery = Gallery.open(address)
    for embeddings, k, offset in ((np.ones(3), 1, 0), (np.ones(DIM), 0, 0), (np.ones(DIM), 1, -1)):
        with pytest.raises(UserError, match="gallery search: found embeddings of shape"):
            gallery.search(embeddings, k, offset=offset)


def test_another_detector_is_an_error_that_names_both(address):
    other = Finder(fingerprint="e" * 64)
    with pytest.raises(UserError, match=r"checkpoint ffffffffffff \(.*checkpoint eeeeeeeeeeee \("):
        Gallery.open(address, create_for=other)
    scaled = Finder()
    scaled.config = scaled.config.copy_and_resolve_references()
    with scaled.config.unlocked():
        scaled.config.data.test_scale = (256, 192)
    with pytest.raises(UserError, match=r"test scale 128x96, .* test scale 256x192"):
        Gallery.open(address).check_detector(scaled)


def test_what_is_no_gallery(tmp_path):
    for place in ("nothing", "."):
        with pytest.raises(UserError, match="found no gallery in"):
            Gallery.open(tmp_path / place)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"found 'photo.jpg' in .*, expected a gallery or an empty"):
        Gallery.open(tmp_path, create_for=Finder())
    with pytest.raises(
        UserError, match=r"found the file .*photo.jpg, expected a gallery or nothing there"
    ):
        Gallery.open(tmp_path / "photo.jpg", create_for=Finder())
    (tmp_path / "damaged" / "people.lance").mkdir(parents=True)
    with pytest.raises(UserError, match="--gallery: "):
        Gallery.open(tmp_path / "damaged")


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_gallery_is_one_line(tmp_path, address, damage):
    copy = tmp_path / "copy"
    shutil.copytree(address, copy)
    rng = np.random.default_rng(0)
    for file in (copy / "people.lance" / "data").rglob("*.lance"):
        content = bytearray(file.read_bytes())
        third = len(content) // 3
        content[third : 2 * third] = b"" if damage == "cut" else rng.bytes(third)
        file.write_bytes(content)
    gallery = Gallery.open(copy)
    with pytest.raises(UserError, match="--gallery: ") as error:
        gallery.search(np.eye(gallery.about.dim, dtype=np.float32)[0], k=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("test_scale", []), ("test_scale", [-1, 96]), ("dim", DIM + 1), ("dim", "16")),
        *(("score_threshold", None), ("max_pixels", 1.5), ("name", "a\nb"), ("checkpoint", 7)),
    ],
)
def test_a_damaged_description_is_one_line(unchecked, address, field, value):
    table = Gallery.open(address).table
    stored = json.loads(table.schema.metadata[ABOUT]) | {field: value}
    damaged = table.schema.with_metadata({ABOUT: json.dumps(stored).encode()})
    with pytest.raises(ValueError, match="a damaged description of what made it"):
        About.of(damaged)
    assert About.of(table.schema).dim == DIM


def test_a_table_without_a_column_is_no_gallery(address):
    schema = Gallery.open(address).table.schema
    for damaged in (
        schema.remove(schema.get_field_index("scene")),
        schema.set(schema.get_field_index("path"), pa.field("path", pa.binary())),
    ):
        with pytest.raises(ValueError, match="lacks a column or has another type"):
            About.of(damaged)


def test_scenes_are_replaced_with_all_their_people(tmp_path):
    gallery = Gallery.open(tmp_path / "g", create_for=Finder())
    for count in (3, 1, 0, 2):
        commit_scenes(gallery, [indexed("/x.jpg", people(count)), indexed("/y.jpg", people(1))])
        assert (gallery.num_people, gallery.num_scenes) == (count + 1, 2)
        found = gallery.search(people(1, 9).embeddings[0], 10)
        assert len(found) == count + 1
    first, second = (
        [indexed("/v.mp4", people(2, s), s / 2, every=0.5, final=s == 3) for s in range(4)],
        [indexed("/v.mp4", people(1, s), s / 1, every=1.0, final=s == 1) for s in range(2)],
    )
    commit_scenes(gallery, first[:2])
    assert known_files(gallery)["/v.mp4"].seconds == {0.0, 0.5}
    commit_scenes(gallery, first[2:])
    assert known_files(gallery)["/v.mp4"].seconds is None
    assert gallery.num_people == 3 + 8
    commit_scenes(gallery, second)
    assert gallery.num_people == 3 + 2
    remove_files(gallery, ["/v.mp4", "/nothing"])
    assert (gallery.num_people, gallery.num_scenes) == (3, 2)
    tidy(gallery)
    purge(gallery)
    assert (gallery.num_people, gallery.num_scenes) == (3, 2)


def test_versions_in_disorder_are_soon_one_line(tmp_path):
    """The newest one has the content of an older one: the next is there already, and always."""
    gallery = Gallery.open(tmp_path / "g", create_for=Finder())
    for number in range(6):
        commit_scenes(gallery, [indexed(f"/{number}.jpg", people(2))])
    versions = sorted((tmp_path / "g" / "people.lance" / "_versions").glob("*.manifest"))
    shutil.copy(versions[3], versions[0])  # the newest comes first
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be written .*onflict for version") as error:
        commit_scenes(Gallery.open(tmp_path / "g"), [indexed("/new.jpg", people(2))])
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 60  # a live conflict is fought for two minutes


def test_many_known_files_are_few_objects(tmp_path):
    gallery = Gallery.open(tmp_path / "people.lance", create_for=Finder())
    nobody = people(0)
    commit_scenes(gallery, [indexed(f"/{n}.jpg", nobody, mtime=n) for n in range(3000)])
    gc.collect()
    before = len(gc.get_objects())
    known = known_files(gallery)
    gc.collect()
    assert len(gc.get_objects()) - before < 300
    assert len(known) == 3000
    assert known["/77.jpg"] == KnownFile(size=10, mtime=77, every=None)
    assert known.get("/3000.jpg") is None


def test_a_vector_index_beyond_what_fits_into_memory(tmp_path):
    gallery = Gallery.open(tmp_path / "g", create_for=Finder(), exact_up_to=500)
    commit_scenes(gallery, [indexed(f"/{i}.jpg", people(4, i), camera=f"c{i}") for i in range(200)])
    assert gallery.memory() is None
    tidy(gallery)
    assert "embedding" in {index.columns[0] for index in gallery.table.list_indices()}
    query = people(4, 7).embeddings[2]
    exact = Gallery.open(tmp_path / "g")
    assert exact.memory() is not None
    for where in (None, Filter(cameras=("c7", "c8"))):
        found, expected = (one.search(query, 5, where) for one in (gallery, exact))
        assert [m.person.id for m in found] == [m.person.id for m in expected]
        np.testing.assert_allclose(
            [m.similarity for m in found], [m.similarity for m in expected], atol=1e-5
        )
    # People who come later are found before the index knows them.
    commit_scenes(gallery, [indexed("/new.jpg", people(1, 999))])
    assert gallery.search(people(1, 999).embeddings[0], 1)[0].person.scene.path == "/new.jpg"


@pytest.mark.parametrize("name", ["people.parquet", "people.arrow"])
def test_an_exported_gallery_is_read_back(tmp_path, address, scenes, name):
    count = export_people(Gallery.open(address), tmp_path / name)
    if name.endswith("parquet"):
        table = pq.read_table(tmp_path / name)
    else:
        table = pa.ipc.open_file(tmp_path / name).read_all()
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == count == table.num_rows == sum(len(one.people.scores) for one in scenes)
    for one in scenes:
        for number, score in enumerate(one.people.scores.tolist()):
            row = rows[f"{one.scene.id}-{number}"]
            assert row["score"] == score
            expected = dataclasses.asdict(one.scene)
            expected["scene"] = expected.pop("id")
            assert {key: row[key] for key in expected} == expected
            assert row["embedding"] == one.people.embeddings[number].tolist()
            assert row["box"] == one.people.boxes[number].tolist()
    with pytest.raises(UserError, match=r"--target: found .*\.csv, expected a file \.parquet or"):
        export_people(Gallery.open(address), tmp_path / "people.csv")


def test_an_empty_gallery(tmp_path):
    gallery = Gallery.open(tmp_path / "g", create_for=Finder())
    assert gallery.search(np.ones(DIM), 5) == []
    assert gallery.search(np.ones((2, DIM)), 5, Filter(folder="/a")) == [[], []]
    assert gallery.scenes(5) == gallery.cameras() == gallery.folders() == []
    assert export_people(gallery, tmp_path / "none.parquet") == 0
    assert list(itertools.chain(known_files(gallery))) == []
