"""Indexing: what is new, changed, renamed, gone, damaged or forgotten; whom a drawn box means."""

import datetime
import itertools
import os
import shutil
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.errors import IncompleteError, UserError
from alignps_jax.files import write_image
from alignps_jax.gallery import index as indexing
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.index import find_people, index, watch
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.gallery.people import People
from alignps_jax.gallery.search import wanted_people
from alignps_jax.inference.many import above
from tests.gallery.painted import RED, ColorDetector, Finder, painted, write_photos
from tests.media.clips import number_of, write_clip

ODD = "deep/d\u00fc \u4eba\n%_\\ 'e\".jpg"


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", ["a.jpg", "b.png", "deep/er/c.jpg", ODD])
    return tmp_path / "photos"


def fill(gallery, source, **how):
    return index(gallery, [str(source)], **how)


def stored_bytes(gallery):
    """All that lies in a gallery's folder, hidden files included."""
    files = Path(gallery.address).rglob("*")
    return b"".join(path.read_bytes() for path in files if path.is_file())


def everybody(gallery):
    """The people by id, with the paths of their photos."""
    found = gallery.search(np.eye(16)[0], 10**4)
    assert len(found) == len(gallery.memory())
    return {match.person.id: match.paths for match in found}


def assert_shown_as_searched(gallery, scene):
    """The pixels are those in which the people were found."""
    pixels = gallery.pixels(scene)
    assert (scene.height, scene.width) == pixels.shape[:2]
    found = above(Finder().detect(pixels), gallery.info.score_threshold)
    boxes = [person.box for person in gallery.memory().people_of(scene.id)]
    np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), found.boxes, atol=1e-5)


def test_everybody_is_found_once(gallery, photos):
    done = fill(gallery, photos)
    assert (len(done.walk.files), done.known, done.scenes, done.walk.skipped) == (4, 0, 4, {})
    assert len(everybody(gallery)) == done.people
    write_photos(photos, ["b.png", "new.jpg"], first=50)  # they alone are looked at
    with People(gallery.address).only_writer(), pytest.raises(UserError, match="another run"):
        fill(gallery, photos)
    done = fill(gallery, photos)
    assert (len(done.walk.files), done.known, done.scenes) == (5, 3, 2)
    assert (gallery.detector.looked, len(gallery.memory().scenes)) == (6, 5)
    for card in gallery.memory().cards(10):
        assert_shown_as_searched(gallery, card.scene)
        for person in gallery.memory().people_of(card.scene.id):
            (match,) = gallery.search_photo(gallery.pixels(card.scene), person.box, 1)
            assert match.person.id == person.id


def test_ids_and_people_follow_renamed_copied_touched_and_swapped_files(gallery, photos):
    a, b, c, z = (photos / name for name in ("a.jpg", "b.png", "moved/er/c.jpg", "z.jpg"))
    fill(gallery, photos)
    before = everybody(gallery)
    (photos / "deep").rename(photos / "moved")
    shutil.copy(a, z)
    os.utime(b, (1, 1))
    assert fill(gallery, photos).known == 1
    expected = {
        name: (path.replace("/deep/", "/moved/"), *[str(z)] * (path == str(a)))
        for name, (path,) in before.items()
    }
    assert everybody(gallery) == expected
    # A copy is shown where the first one is gone, and its people stay when that is pruned.
    a.unlink()
    for card in gallery.memory().cards(9):
        assert_shown_as_searched(gallery, card.scene)
    assert fill(gallery, photos, prune=True).removed == 1
    assert everybody(gallery) == {name: (paths[-1],) for name, paths in expected.items()}
    z.rename(photos / "x")
    c.rename(z)
    (photos / "x").rename(c)
    fill(gallery, photos)
    places = {str(z): str(c), str(c): str(z)}
    expected = {name: (places.get(path, path),) for name, (*_, path) in expected.items()}
    assert everybody(gallery) == expected
    assert gallery.detector.looked == 4


def test_prune_drops_what_is_gone_below_the_source_alone(gallery, photos, tmp_path):
    write_photos(tmp_path, ["other/x.jpg", "linked/y.jpg"], first=9)
    (photos / "link").symlink_to(tmp_path / "linked")
    fill(gallery, photos)
    fill(gallery, tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    for gone in ("linked/y.jpg", "photos/a.jpg"):
        (tmp_path / gone).unlink()
    assert [fill(gallery, photos, prune=prune).removed for prune in (False, True)] == [0, 2]
    for path in photos.rglob("*.*g"):
        path.unlink()
    assert fill(gallery, photos, prune=True).removed == 0  # a disk may not be there
    names = {os.path.basename(card.scene.path) for card in gallery.memory().cards(10)}
    assert names == {"b.png", "c.jpg", os.path.basename(ODD), "x.jpg"}


def test_what_cannot_be_read_or_is_not_finite_is_left_out_and_said(gallery, photos, monkeypatch):
    find = Finder.find

    def broken(self, image):
        found = find(self, image)
        found.embeddings[0, 3], found.boxes[1, 2] = np.nan, np.inf
        return found

    monkeypatch.setattr(Finder, "find", broken)
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:700])
    (photos / "text.webp").write_text("no photo")
    (photos / "no.mp4").write_bytes(b"no video")
    write_image(photos / "huge.png", np.zeros((1001, 1000, 3), np.uint8))
    for scenes in (4, 0):  # the same again tomorrow
        done = fill(gallery, photos)
        assert (done.scenes, len(gallery.memory().scenes)) == (scenes, 4)
        assert (done.unsound > 0) == (scenes > 0)
        names = {os.path.basename(path) for path in done.walk.skipped}
        assert names == {"cut.jpg", "text.webp", "no.mp4", "huge.png"}
    assert np.isfinite(gallery.embeddings([*everybody(gallery)])).all()


def test_a_video_is_a_frame_every_so_often(gallery, tmp_path, monkeypatch):
    path = tmp_path / "VID_20240131_120000.mp4"
    write_clip(path, [number / 5 for number in range(23)])
    fill(gallery, path, every=1.0)
    (card,) = gallery.memory().cards(10)
    scenes = gallery.memory().scenes_of(card.scene.hash)
    assert card.frames == len(scenes) == 5
    for second, scene in enumerate(scenes):
        assert_shown_as_searched(gallery, scene)
        assert number_of(gallery.pixels(scene)) == 5 * second
        assert scene.second == pytest.approx(second)
        assert scene.taken == datetime.datetime(2024, 1, 31, 12, 0, second)
    for every in (1.0, 2.0):
        assert fill(gallery, path, every=every).known == 1
    assert gallery.detector.looked == 5
    # More often, after an interruption and with a copy: frames are added.
    shutil.copy(path, tmp_path / "copy.mp4")
    monkeypatch.setattr(indexing, "COMMIT_SECONDS", 0.0)

    def interrupted(*given):
        yield from itertools.islice(find_people(*given), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(gallery, tmp_path, every=0.4, find=interrupted)
    fill(gallery, tmp_path, every=0.4)
    found = {round(one.second, 1) for one in gallery.memory().scenes_of(card.scene.hash)}
    assert found == {*np.arange(0, 4.5, 0.4).round(1).tolist(), *range(5)}
    for path in tmp_path.glob("*.mp4"):
        os.utime(path, (1, 1))
    with pytest.raises(UserError, match="has changed since it was indexed"):
        gallery.pixels(gallery.memory().cards(1)[0].scene)


def test_what_is_added_to_a_folder_is_indexed(gallery, photos):
    end, scenes = time.monotonic() + 60, []

    def run():
        scenes.append(fill(gallery, photos).scenes)
        write_photos(photos, ["deep/er/x.png"], first=9)
        raise IncompleteError("one cannot be read")  # that is no reason to end

    stop = threading.Event()
    stop.is_set = lambda: len(scenes) > 1 or time.monotonic() > end
    watch(run, [str(photos)], stop)
    assert scenes == [4, 1]


def test_the_forgotten_are_gone_for_good(gallery, photos, monkeypatch):
    """A photo with its copies, and single people, in one run; ids of others stay the same."""
    monkeypatch.setattr(indexing, "COMMIT_SECONDS", 60.0)  # copies are read together
    a, copy = str(photos / "a.jpg"), str(photos / "copy.jpg")
    shutil.copy(a, copy)
    done = fill(gallery, photos)
    assert (done.people, done.scenes) == (len(gallery.memory()), 4)
    before = everybody(gallery)
    of_photo = {name for name, paths in before.items() if a in paths}
    one, other, *_ = sorted(before.keys() - of_photo)
    stay = before.keys() - of_photo - {one, other}
    marks = Marks(gallery.people)
    marks.put([Mark(one, "view", True, 0.5, "secret"), Mark("view", one, True, 0.5, "secret")])
    marks.put([Mark("view", "kept", True, 0.5, "")])
    bytes_of = {name: gallery.embeddings([name]).tobytes() for name in before}
    whole = stored_bytes(gallery)
    assert all(found in whole for found in (*bytes_of.values(), b"secret"))
    done = forget(gallery.people, [copy], [one, other])
    assert (done.people, done.remains) == (len(before) - len(stay), None)
    left = stored_bytes(gallery)
    assert {name for name, found in bytes_of.items() if found in left} == stay
    assert b"secret" not in left
    assert [mark.person for mark in marks.all()] == ["kept"]
    # They do not come back, whatever happens to their files, and nobody else changes.
    for path in photos.rglob("*.*g"):
        os.utime(path, (1, 1))
    shutil.copy(a, photos / "another copy.jpg")
    looked = gallery.detector.looked
    done = fill(gallery, photos)
    assert (done.scenes, done.people, gallery.detector.looked) == (0, 0, looked)
    assert fill(gallery, photos).known == 6
    assert everybody(gallery).keys() == stay
    gallery.people.files.delete("path", [str(path) for path in photos.rglob("*.*g")])
    photos = photos.rename(photos.with_name("renamed"))
    assert fill(gallery, photos).people == len(stay)
    assert everybody(gallery).keys() == stay
    # Names match however Unicode composes them; a store that keeps older states says so.
    gallery.people.address = "db://people"
    done = forget(gallery.people, [unicodedata.normalize("NFD", str(photos / ODD))])
    assert "keeps older states" in done.remains
    assert (str(photos / ODD),) not in everybody(gallery).values()


def test_people_are_forgotten_while_others_index(gallery, photos, monkeypatch):
    """Copies are read together, and somebody is forgotten before the second one is stored."""
    shutil.copy(photos / "a.jpg", photos / "a copy.jpg")
    monkeypatch.setattr(indexing, "COMMIT_SECONDS", 0.0)
    put, people = People.commit, gallery.people

    def commit(self, scenes, files):
        if people.table.count() and not people.forgotten.count():
            forget(people, persons=people.table.rows(["id"])["id"].to_pylist()[:1])
        put(self, scenes, files)

    monkeypatch.setattr(People, "commit", commit)
    fill(gallery, photos)
    (victim,) = {*people.forgotten.rows()["person"].to_pylist()}
    assert victim not in everybody(gallery)
    assert len(gallery.memory().scenes) == 4


def test_a_box_means_who_is_under_it_and_is_looked_at_again():
    near, photo = ColorDetector(), painted((RED, (20, 60)), (RED, (200, 90)))
    # Finds people in parts of a photo alone.
    near.detect = lambda image: above(ColorDetector().detect(image), len(image) // 240)
    for detector in (ColorDetector(), near):
        found = wanted_people(detector, photo, (22, 55, 52, 145))
        assert found.boxes.tolist() == [[20, 60, 50, 140]]
        found = wanted_people(detector, photo, (205, 95, 228, 165))
        assert found.boxes.tolist() == [[200, 90, 230, 170]]
        for drawn in ((49, 60, 200, 170), (9, 9, 3, 3)):  # the edge of a neighbor, nothing
            with pytest.raises(UserError, match="nobody was found at"):
                wanted_people(detector, photo, drawn)
