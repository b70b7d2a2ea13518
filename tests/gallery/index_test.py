"""Indexing photos and videos: what is new, changed, renamed, gone, damaged or to be forgotten."""

from __future__ import annotations

import os
import shutil
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.errors import UserError
from alignps_jax.files import write_image
from alignps_jax.gallery import index as indexing
from alignps_jax.gallery.entries import content_hash
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import index
from alignps_jax.gallery.people import People
from alignps_jax.gallery.tables import Note
from alignps_jax.gallery.watch import watch
from tests.gallery.finder import Finder, stored_bytes
from tests.gallery.networks import photo, write_photos, write_video

FINDER = Finder()
ODD = "deep/d\u00fc \u4eba\n%_\\ 'e\".jpg"


@pytest.fixture
def gallery(tmp_path):
    return Gallery.open(tmp_path / "people.lance", Finder(), create=True)


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", ["a.jpg", "b.png", "deep/er/c.jpg", ODD])
    return tmp_path / "photos"


def fill(gallery, source, **how):
    return index(gallery, [str(source)], **how)


def expected_people(pixels):
    found = FINDER.detect(pixels)
    return found.boxes[found.scores >= FINDER.config.eval.score_threshold]


def touch_later(path):
    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def everybody(gallery):
    """The people by id, with the paths of their photos."""
    found = gallery.search(np.eye(16)[0], 10**4)
    return {match.person.id: match.paths for match in found}


def scene_at(gallery, path):
    (scene,) = gallery.scenes_of(content_hash(Path(path).read_bytes()))
    return scene


def test_everybody_is_found_once(gallery, photos):
    done = fill(gallery, photos)
    assert (len(done.walk.files), done.known, done.scenes, done.walk.skipped) == (4, 0, 4, {})
    for card in gallery.scenes(10):
        boxes = [person.box for person in gallery.people_of(card.scene.id)]
        pixels = gallery.pixels(card.scene)
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), expected_people(pixels), atol=1e-5)
        assert (card.scene.height, card.scene.width) == pixels.shape[:2]
        is_jpeg = card.scene.path.endswith(".jpg")
        assert max(gallery.pixels(card.scene, side=40).shape) == (64 if is_jpeg else 128)
    assert len(everybody(gallery)) == gallery.num_people == done.people
    again = fill(gallery, photos)
    assert (again.known, again.scenes) == (4, 0)
    # New and changed files alone are looked at.
    write_image(photos / "b.png", photo(50))
    write_photos(photos, ["new.jpg"], first=60)
    before = gallery.detector.looked
    done = fill(gallery, photos)
    assert (len(done.walk.files), done.known, done.scenes) == (5, 3, 2)
    assert gallery.detector.looked == before + 2
    assert gallery.num_scenes == 5
    changed = scene_at(gallery, photos / "b.png")
    assert len(gallery.people_of(changed.id)) == len(expected_people(photo(50)))


def test_ids_and_people_follow_renamed_copied_and_touched_files(gallery, photos):
    fill(gallery, photos)
    before, looked = everybody(gallery), gallery.detector.looked
    (photos / "deep").rename(photos / "moved")
    shutil.copy(photos / "a.jpg", photos / "z.jpg")
    touch_later(photos / "b.png")
    done = fill(gallery, photos)
    assert (done.known, done.scenes, gallery.detector.looked) == (1, 0, looked)
    after = everybody(gallery)
    assert after.keys() == before.keys()
    for name, (path, *others) in before.items():
        assert others == []
        expected = [path.replace("/deep/", "/moved/")]
        expected += [str(photos / "z.jpg")] * path.endswith("a.jpg")
        assert after[name] == tuple(expected)
        assert gallery.pixels(gallery.person(name).scene).shape == (96, 128, 3)
    # A copy is shown where the first one is gone, and its people stay when that is pruned.
    (photos / "a.jpg").unlink()
    scene = scene_at(gallery, photos / "z.jpg")
    assert gallery.pixels(scene).shape == (96, 128, 3)
    assert fill(gallery, photos, prune=True).removed == 1
    assert everybody(gallery).keys() == before.keys()
    assert scene_at(gallery, photos / "z.jpg").path == str(photos / "z.jpg")
    # Two files that change places keep their people.
    before = everybody(gallery)
    one, other = photos / "z.jpg", photos / "moved" / "er" / "c.jpg"
    one.rename(photos / "x")
    other.rename(one)
    (photos / "x").rename(other)
    touch_later(one)
    touch_later(other)
    assert fill(gallery, photos).scenes == 0
    places = {str(one): str(other), str(other): str(one)}
    expected = {
        name: tuple(places.get(path, path) for path in paths) for name, paths in before.items()
    }
    assert everybody(gallery) == expected


def test_prune_drops_what_is_gone_below_the_source_alone(gallery, photos, tmp_path):
    other = write_photos(tmp_path / "other", ["x.jpg"], first=9)[0]
    fill(gallery, photos)
    fill(gallery, other)
    other.unlink()
    (photos / "a.jpg").unlink()
    assert fill(gallery, photos).removed == 0
    assert gallery.num_scenes == 5
    assert fill(gallery, photos, prune=True).removed == 1
    names = [os.path.basename(card.scene.path) for card in gallery.scenes(10)]
    assert sorted(names) == ["b.png", "c.jpg", os.path.basename(ODD), "x.jpg"]
    before = everybody(gallery).keys()
    (photos / "b.png").rename(photos / "z.png")  # nobody goes who is in it
    assert fill(gallery, photos, prune=True).removed == 1
    assert everybody(gallery).keys() == before
    for path in photos.rglob("*.*g"):
        path.unlink()
    with pytest.raises(UserError, match=r"--prune: found no photo or video, 3 known files"):
        fill(gallery, photos, prune=True)


def test_what_cannot_be_read_is_listed_and_all_else_is_indexed(gallery, photos):
    whole = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "copy of cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.webp").write_text("no photo")
    (photos / "no.mp4").write_bytes(b"no video")
    write_image(photos / "huge.png", np.zeros((1001, 1000, 3), np.uint8))
    (photos / "notes.txt").touch()
    for turn in range(2):  # the same again tomorrow
        done = fill(gallery, photos)
        assert (done.scenes, gallery.num_scenes) == (0 if turn else 4, 4)
        names = {os.path.basename(path) for path in done.walk.skipped}
        assert names >= {"text.webp", "no.mp4", "huge.png"}
        assert names & {"cut.jpg", "copy of cut.jpg"}
        assert dict(done.walk.others) == {".txt": 1}
    finder = Finder()
    with (wider := finder.config.copy_and_resolve_references()).unlocked():
        wider.data.max_pixels = 2_000_000
    finder.config = wider
    gallery = Gallery.open(gallery.address, finder)
    assert fill(gallery, photos).scenes == 1
    assert gallery.pixels(scene_at(gallery, photos / "huge.png")).shape == (1001, 1000, 3)


def test_detections_that_are_not_finite_are_left_out_and_counted(gallery, photos, monkeypatch):
    find = Finder.find

    def broken(self, image):
        boxes, scores, embeddings, valid = find(self, image)
        embeddings[0, 3], boxes[1, 2] = np.nan, np.inf
        return boxes, scores, embeddings, valid

    monkeypatch.setattr(Finder, "find", broken)
    whole = sum(len(expected_people(photo(seed))) for seed in range(4))
    done = fill(gallery, photos)
    assert done.unsound > 0
    assert done.people + done.unsound >= gallery.num_people == done.people < whole
    assert len(everybody(gallery)) == done.people


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_a_video_is_a_frame_every_so_often(gallery, tmp_path, suffix):
    frames = [photo(number) for number in range(23)]
    path = write_video(tmp_path / f"VID_20240131_120000{suffix}", frames, rate=5)
    done = fill(gallery, path, every=1.0)
    assert (len(done.walk.files), done.scenes, done.walk.skipped) == (1, 5, {})
    (card,) = gallery.scenes(10)
    scenes = gallery.scenes_of(card.scene.hash)
    assert card.frames == 5
    assert [round(scene.second, 2) for scene in scenes] == [0, 1, 2, 3, 4]
    assert [str(scene.taken)[14:19] for scene in scenes] == [f"00:0{second}" for second in range(5)]
    for number, scene in zip(range(0, 23, 5), scenes, strict=True):
        pixels = gallery.pixels(scene)
        # The right frame, as exactly as such a video can hold it.
        errors = [np.abs(pixels.astype(float) - frame).mean() for frame in frames]
        assert int(np.argmin(errors)) == number
        boxes = [person.box for person in gallery.people_of(scene.id)]
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), expected_people(pixels), atol=1e-5)
    looked = gallery.detector.looked
    path = path.rename(tmp_path / f"renamed{suffix}")
    assert fill(gallery, path, every=1.0).scenes == 0
    assert fill(gallery, path, every=1.0).known == 1
    assert gallery.detector.looked == looked
    fill(gallery, path, every=2.0)
    assert [round(s.second, 2) for s in gallery.scenes_of(card.scene.hash)] == [0, 2, 4]
    touch_later(path)
    with pytest.raises(UserError, match="has changed since it was indexed"):
        gallery.pixels(gallery.scenes(1)[0].scene)


def test_what_is_added_to_a_folder_is_indexed(gallery, photos):
    (photos / "bad.jpg").touch()
    stop = threading.Event()
    thread = threading.Thread(
        target=watch, args=(lambda: fill(gallery, photos).walk.report(), [str(photos)], stop)
    )
    thread.start()
    try:
        for number, name in ((4, None), (5, "new.jpg"), (6, "deep/er/x.png")):
            if name:
                write_photos(photos, [name], first=20 + number)
            end = time.monotonic() + 60
            while gallery.num_scenes < number and time.monotonic() < end:
                time.sleep(0.05)
            assert gallery.num_scenes == number
    finally:
        stop.set()
        thread.join()


def test_one_process_indexes_a_gallery_at_a_time(gallery, photos):
    with (
        People(gallery.address).only_writer(),
        pytest.raises(UserError, match="found another run that writes there"),
    ):
        fill(gallery, photos)
    assert fill(gallery, photos).scenes == 4


def test_copies_that_are_read_together_count_once(gallery, photos, monkeypatch):
    monkeypatch.setattr(indexing, "COMMIT_SECONDS", 60.0)
    shutil.copy(photos / "a.jpg", photos / "copy.jpg")
    done = fill(gallery, photos)
    assert (done.people, done.scenes) == (gallery.num_people, gallery.num_scenes)


def test_the_forgotten_are_gone_for_good(gallery, photos, tmp_path):
    """A photo with its copies, and single people, in one run; ids of others stay the same."""
    shutil.copy(photos / "a.jpg", photos / "copy.jpg")
    fill(gallery, photos)
    before = everybody(gallery)
    of_photo = {name for name, paths in before.items() if str(photos / "a.jpg") in paths}
    one, other, *_ = sorted(before.keys() - of_photo)
    bytes_of = {name: gallery.embeddings([name]).tobytes() for name in before}
    assert all(found in stored_bytes(gallery.address) for found in bytes_of.values())
    gone = of_photo | {one, other}
    marks = gallery.people.notes("marks")
    marks.put([Note("gone", (one, "view"), {"path": "secret"}), Note("kept", ("view",), {})])
    done = forget(gallery.people, [str(photos / "copy.jpg")], [one, other])
    assert (done.people, done.remains) == (len(gone), None)
    left = stored_bytes(gallery.address)
    for name, found in bytes_of.items():
        assert (found in left) == (name not in gone)
    assert b"secret" not in left
    assert [note.id for note in marks.all()] == ["kept"]
    # They do not come back, whatever happens to their files, and nobody else changes.
    for path in photos.rglob("*.*g"):
        touch_later(path)
    shutil.copy(photos / "a.jpg", photos / "another copy.jpg")
    looked = gallery.detector.looked
    done = fill(gallery, photos)
    assert (done.scenes, done.people, gallery.detector.looked) == (0, 0, looked)
    assert fill(gallery, photos).known == 6
    assert everybody(gallery).keys() == before.keys() - gone
    assert forget(gallery.people, [str(photos / "a.jpg")]).people == 0
    gallery.people.remove_files([str(path) for path in photos.rglob("*.*g")])
    done = fill(gallery, photos)
    assert everybody(gallery).keys() == before.keys() - gone
    assert done.people == len(before.keys() - gone)
    for photo_, person in (("nothing.jpg", ""), ("", one)):
        with pytest.raises(UserError, match=r"found no .* in the gallery"):
            forget(gallery.people, [photo_] * bool(photo_), [person] * bool(person))
    # Names match however Unicode composes them; a store that keeps older states says so.
    name = str(photos / ODD)
    gallery.people.address = "db://people"
    done = forget(gallery.people, [unicodedata.normalize("NFD", name)])
    assert "keeps older states" in done.remains
    assert name not in {paths[0] for paths in everybody(gallery).values()}


def test_people_are_forgotten_while_others_index(gallery, photos, monkeypatch):
    fill(gallery, photos)
    victim = next(iter(everybody(gallery)))
    again = Gallery.open(gallery.address + "2", Finder(), create=True)
    put = People.commit

    def commit(self, scenes, files):
        put(self, scenes, files)
        if not again.people.notes("forgotten").all():
            forget(People(again.address), persons=[victim])

    monkeypatch.setattr(People, "commit", commit)
    fill(again, photos)
    assert victim not in everybody(again)
    assert len(everybody(again)) == len(everybody(gallery)) - 1


def test_the_gallery_in_python(tmp_path, photos):
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    assert gallery.add(str(photos / "a.jpg")) == {}
    assert gallery.add([photos / "a.jpg", photos / "deep"]) == {}
    assert gallery.num_scenes == 3
    person = gallery.person(next(iter(everybody(gallery))))
    scene = person.scene
    (match,) = gallery.search_photo(gallery.pixels(scene), person.box, 1)
    assert match.person.id == person.id
    with pytest.raises(UserError, match="nobody was found at"):
        gallery.search_photo(gallery.pixels(scene), (100, 90, 120, 95), 1)
    with pytest.raises(UserError, match=r"expected Gallery\.open\(\.\.\., detector="):
        Gallery.open(tmp_path / "g").add([photos])
