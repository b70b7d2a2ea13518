"""Indexing photos and videos: what is new, changed, gone, damaged or to be forgotten."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from alignps_jax.files import write_image
from alignps_jax.gallery.entries import Filter, scene_id
from alignps_jax.gallery.forgetting import forget_person, forget_photo
from alignps_jax.gallery.indexing import index
from alignps_jax.gallery.store import Gallery
from alignps_jax.types import UserError
from tests.gallery.finder import Finder
from tests.gallery.networks import photo, write_photos, write_video

FINDER = Finder()


@pytest.fixture
def gallery(tmp_path):
    return Gallery.open(tmp_path / "people.lance", create_for=FINDER)


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", ["a.jpg", "b.png", "deep/er/c.jpg", "deep/d\u00fc e.jpg"])
    return tmp_path / "photos"


def fill(gallery, source, **how):
    return index(gallery, FINDER, [str(source)], **how)


def expected_people(pixels):
    found = FINDER.detect(pixels)
    return found.boxes[found.scores >= FINDER.config.eval.score_threshold]


def touch_later(path):
    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def test_everybody_is_found_once(gallery, photos):
    done = fill(gallery, photos)
    assert (done.found, done.known, done.scenes, done.skipped) == (4, 0, 4, {})
    for scene in gallery.scenes(10):
        boxes = [person.box for person in gallery.people(scene.id)]
        pixels = gallery.pixels(scene)
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), expected_people(pixels), atol=1e-5)
        assert (scene.height, scene.width) == pixels.shape[:2]
    assert sum(len(gallery.people(scene.id)) for scene in gallery.scenes(10)) == done.people
    again = fill(gallery, photos)
    assert (again.known, again.scenes) == (4, 0)


def test_new_and_changed_files_alone_are_looked_at(gallery, photos):
    fill(gallery, photos)
    write_image(photos / "b.png", photo(50))
    touch_later(photos / "b.png")
    write_photos(photos, ["new.jpg"], first=60)
    done = fill(gallery, photos)
    assert (done.found, done.known, done.scenes) == (5, 3, 2)
    assert gallery.num_scenes == 5
    changed = scene_id(str(photos / "b.png"), None)
    assert len(gallery.people(changed)) == len(expected_people(photo(50)))


def test_prune_drops_what_is_gone_below_the_source_alone(gallery, photos, tmp_path):
    other = write_photos(tmp_path / "other", ["x.jpg"], first=9)[0]
    fill(gallery, photos)
    fill(gallery, other)
    other.unlink()
    (photos / "a.jpg").unlink()
    assert fill(gallery, photos).removed == 0
    assert gallery.num_scenes == 5
    assert fill(gallery, photos, prune=True).removed == 1
    names = [os.path.basename(scene.path) for scene in gallery.scenes(10)]
    assert sorted(names) == ["b.png", "c.jpg", "d\u00fc e.jpg", "x.jpg"]
    for path in photos.rglob("*.*g"):
        path.unlink()
    with pytest.raises(UserError, match=r"--prune: found no photo or video below .* 3 known files"):
        fill(gallery, photos, prune=True)


def test_what_cannot_be_read_is_listed_and_all_else_is_indexed(gallery, photos):
    whole = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.webp").write_text("no photo")
    (photos / "no.mp4").write_bytes(b"no video")
    (photos / "gone.jpg").symlink_to("nowhere")
    write_image(photos / "huge.png", np.zeros((1001, 1000, 3), np.uint8))
    os.mkfifo(photos / "pipe.jpg")
    (photos / "folder.jpg").mkdir()
    (photos / "circle").symlink_to("circle")
    done = fill(gallery, photos)
    assert (done.scenes, gallery.num_scenes) == (4, 4)
    reasons = {os.path.basename(path): reason for path, reason in done.skipped.items()}
    parts = {
        "cut.jpg": "truncated JPEG",
        "gone.jpg": "No such file or directory",
        "huge.png": "found 1000x1001 pixels, expected 1,000,000",
        "no.mp4": "cannot be decoded",
        "pipe.jpg": "found no regular file",
        "text.webp": "expected a photo",
    }
    assert reasons.keys() == parts.keys()
    for name, part in parts.items():
        assert part in reasons[name]
    assert fill(gallery, photos).skipped.keys() == done.skipped.keys()


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_a_video_is_a_frame_every_so_often(gallery, tmp_path, suffix):
    frames = [photo(number) for number in range(23)]
    path = write_video(tmp_path / f"VID_20240131_120000{suffix}", frames, rate=5)
    done = fill(gallery, path, every=1.0)
    assert (done.found, done.scenes, done.skipped) == (1, 5, {})
    scenes = gallery.scenes(10)
    assert [scene.second for scene in scenes] == [0, 1, 2, 3, 4]
    assert [str(scene.taken)[-5:] for scene in scenes] == [f"00:0{second}" for second in range(5)]
    for number, scene in zip(range(0, 23, 5), scenes, strict=True):
        pixels = gallery.pixels(scene)
        # The right frame, as exactly as such a video can hold it.
        errors = [np.abs(pixels.astype(float) - frame).mean() for frame in frames]
        assert int(np.argmin(errors)) == number
        boxes = [person.box for person in gallery.people(scene.id)]
        np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), expected_people(pixels), atol=1e-5)
    assert fill(gallery, path, every=1.0).known == 1
    fill(gallery, path, every=2.0)
    assert [scene.second for scene in gallery.scenes(10)] == [0, 2, 4]
    if suffix == ".avi":
        (*_, last) = gallery.scenes(10)
        touch_later(path)
        with pytest.raises(UserError, match="has changed since it was indexed"):
            gallery.pixels(last)


def test_links_lead_nobody_in_circles_or_twice(gallery, photos):
    (photos / "deep" / "loop").symlink_to(photos)
    (photos / "again").symlink_to(photos / "deep")
    (photos / "link.jpg").symlink_to("a.jpg")
    done = fill(gallery, photos)
    assert (done.found, gallery.num_scenes, done.skipped) == (4, 4, {})
    below = Filter(folder=str(photos / "again"))
    assert len(gallery.scenes(10, where=below)) == 2


def test_names_of_all_kinds(gallery, tmp_path):
    names = ["a b.jpg", "\u00fc\u4eba.jpg", "new\nline.jpg", "it's.jpg", "%_\\.jpg", '"q".jpg']
    write_photos(tmp_path / "names", names)
    try:
        (tmp_path / "names" / os.fsdecode(b"\xff.jpg")).touch()
        unreadable = 1
    except OSError:  # this file system has text as names only
        unreadable = 0
    done = fill(gallery, tmp_path / "names")
    assert len(done.skipped) == unreadable
    assert all("a name that is no text" in reason for reason in done.skipped.values())
    assert sorted(os.path.basename(s.path) for s in gallery.scenes(10)) == sorted(names)
    assert fill(gallery, tmp_path / "names").known == len(names)
    for scene in gallery.scenes(10):
        assert gallery.pixels(scene).shape == (96, 128, 3)


def test_a_photo_that_is_replaced_while_it_is_indexed(gallery, tmp_path):
    """Whatever state was read is the one that is stored, and the last one wins in the end."""
    path = tmp_path / "busy.png"
    states = [cv2.imencode(".png", photo(seed)[..., ::-1])[1].tobytes() for seed in range(2)]
    path.write_bytes(states[0])
    stop = threading.Event()

    def replace():
        turn = 0
        while not stop.is_set():
            turn += 1
            temporary = tmp_path / "busy.tmp"
            temporary.write_bytes(states[turn % 2])
            temporary.replace(path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(5):
            done = fill(gallery, path)
            assert all("changes while it is read" in text for text in done.skipped.values())
            assert gallery.num_scenes <= 1
    finally:
        stop.set()
        thread.join()
    write_image(path, photo(5))
    touch_later(path)
    fill(gallery, path)
    assert len(gallery.people(scene_id(str(path), None))) == len(expected_people(photo(5)))
    assert gallery.num_people == len(expected_people(photo(5)))


def crowded(gallery):
    """A scene with several people."""
    return max(gallery.scenes(10), key=lambda scene: len(gallery.people(scene.id)))


def stored(gallery):
    found = gallery.address, gallery.address + "/people.lance"
    return {
        os.path.join(folder, name)
        for folder, _, names in os.walk(found[1])
        for name in names
        if name.endswith((".lance", ".idx", ".arrow"))
    }


def test_copies_are_forgotten_with_a_photo_or_person(gallery, photos):
    fill(gallery, photos)
    scene = crowded(gallery)
    for copy in ("1.jpg", "2.jpg"):
        (photos / copy).write_bytes(Path(scene.path).read_bytes())
    everybody = gallery.num_people
    fill(gallery, photos)
    count = len(gallery.people(scene.id))
    assert gallery.num_people == everybody + 2 * count
    forget_person(gallery, gallery.people(scene.id)[-1].id)
    assert gallery.num_people == everybody + 2 * count - 3
    assert forget_photo(gallery, photos / "1.jpg") == 3 * (count - 1)
    assert gallery.num_people == everybody - count


def test_a_forgotten_photo_is_gone_for_good(gallery, photos):
    fill(gallery, photos)
    scene = crowded(gallery)
    people, before = gallery.people(scene.id), stored(gallery)
    embedding = gallery.embeddings([people[0].id])[0]
    others = gallery.num_people - len(people)
    assert forget_photo(gallery, scene.path) == len(people)
    assert gallery.num_people == others
    assert gallery.scene(scene.id) is None
    assert not before & stored(gallery), "a file that may hold them"
    for state in gallery.table.list_versions():
        gallery.table.checkout(state["version"])
        assert gallery.table.count_rows(f"path = '{scene.path}'") == 0
    similar = gallery.search(embedding, 100)
    assert all(match.person.scene.id != scene.id for match in similar)
    # Neither the file nor a copy comes back, and to forget it again is no error.
    copy = photos / "copy.jpg"
    copy.write_bytes(Path(scene.path).read_bytes())
    touch_later(scene.path)
    fill(gallery, photos)
    assert gallery.num_people == others
    assert forget_photo(gallery, scene.path) == 0
    with pytest.raises(UserError, match=r"--photo: found no nothing\.jpg in the gallery"):
        forget_photo(gallery, "nothing.jpg")


def test_a_forgotten_person_is_gone_for_good(gallery, photos):
    fill(gallery, photos)
    scene = crowded(gallery)
    for left in range(len(gallery.people(scene.id)) - 1, -1, -1):
        before = stored(gallery)
        person = gallery.people(scene.id)[0]
        assert forget_person(gallery, person.id) == scene
        assert not before & stored(gallery)
        kept = gallery.people(scene.id)
        assert len(kept) == left
        touch_later(scene.path)
        fill(gallery, photos)
        again = gallery.people(scene.id)
        assert [one.box.tolist() for one in again] == [one.box.tolist() for one in kept]
        assert gallery.num_scenes == 4
    with pytest.raises(UserError, match="--person: found no 'nobody' in the gallery"):
        forget_person(gallery, "nobody")


def test_the_gallery_in_python(tmp_path, photos):
    gallery = Gallery.open(tmp_path / "g", create_for=FINDER)
    assert gallery.add([photos / "a.jpg", photos / "deep"]) == {}
    scene = crowded(gallery)
    person = gallery.people(scene.id)[0]
    (match,) = gallery.search_photo(gallery.pixels(scene), person.box, 1)
    assert match.person.id == person.id
    with pytest.raises(UserError, match="was opened without a detector"):
        Gallery.open(tmp_path / "g").add([photos])
