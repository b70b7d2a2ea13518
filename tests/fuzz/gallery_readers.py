"""The readers of galleries, and of videos that go into one, that are fuzzed.

What needs LanceDB is imported in the process that reads: its threads would not survive the fork.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignps_jax.gallery.entries import FileState, Filter, Match, Person, Scene, scene_id
from alignps_jax.types import Detections
from tests.fuzz.mutations import damage, damage_json
from tests.fuzz.runner import Reader

_HAS_EXTRA = importlib.util.find_spec("lancedb") is not None
_PEOPLE, _DIM = 4, 16
_MAX_PIXELS = 10_000_000
# The description of what made a gallery, in the manifests of its tables.
_ABOUT = re.compile(rb'\{"checkpoint": [^}]*\}')


def _people(seed: int) -> Detections:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (_PEOPLE, 2))
    embeddings = rng.normal(size=(_PEOPLE, _DIM))
    return Detections(
        np.hstack([corner, corner + 30]).astype(np.float32),
        np.linspace(0.9, 0.4, _PEOPLE, dtype=np.float32),
        (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32),
        np.ones(_PEOPLE, bool),
    )


def _gallery(folder: Path) -> Sequence[Path]:
    """Photos and a video, old states, indices of all kinds, claims, and somebody forgotten."""
    from alignps_jax.gallery.claims import Claims
    from alignps_jax.gallery.forgotten import Forgotten
    from alignps_jax.gallery.store import Gallery
    from alignps_jax.gallery.table import IndexedScene
    from alignps_jax.gallery.writing import commit_scenes, tidy
    from tests.gallery.finder import Finder

    gallery = Gallery.open(folder / "g", create_for=Finder(), exact_up_to=100)
    scenes = []
    for number in range(80):
        second = number / 2 if number % 4 == 0 else None
        path = "/v/walk.mp4" if second is not None else f"/a/{number}.jpg"
        scene = Scene(scene_id(path, second), path, 90, 120, None, f"c{number % 3}", second)
        every = 0.5 if second is not None else None
        scenes.append(IndexedScene(scene, FileState(10, 1, f"h{path}"), _people(number), every))
    commit_scenes(gallery, scenes[:76])
    tidy(gallery)
    commit_scenes(gallery, scenes[76:])
    Forgotten(gallery).add(scenes[1].scene, "h", (1, 2, 30, 40))
    claims = Claims(gallery)
    next(claims.shares([], lambda files: files), None)
    return sorted(path for path in (folder / "g").rglob("*") if path.is_file())


@dataclasses.dataclass(frozen=True)
class _Found:
    """All that was read of a gallery."""

    scenes: list[Scene]
    people: list[Person]
    matches: list[Match]
    embeddings: np.ndarray


def _read_gallery(folder: Path) -> _Found:
    """What the page, a search and an indexing process read."""
    from alignps_jax.gallery.forgotten import Forgotten
    from alignps_jax.gallery.store import Gallery
    from alignps_jax.gallery.writing import known_files

    gallery = Gallery.open(folder / "g")
    scenes = gallery.scenes(100)
    people = [person for scene in scenes[:2] for person in gallery.people(scene.id)]
    names = [*gallery.cameras(), *gallery.folders(), *known_files(gallery)]
    assert all(isinstance(name, str) for name in names), "a name that is no text"
    assert gallery.num_scenes >= 0
    Forgotten(gallery).refresh()
    dim = gallery.about.dim
    query = np.full(dim, 1 / np.sqrt(dim), np.float32)
    matches = gallery.search(query, 20, Filter(min_score=0.5)) + gallery.search(query, 500)
    among_many = Gallery.open(folder / "g", exact_up_to=0)
    matches += among_many.search(query, 20, Filter(cameras=("c1", "c2"))) + among_many.search(
        query, 20
    )
    embeddings = gallery.embeddings(sorted({match.person.id for match in matches[:30]}))
    return _Found(scenes, people, matches, embeddings)


def _check_gallery(found: _Found) -> None:
    for scene in (*found.scenes, *(one.person.scene for one in found.matches)):
        assert scene.height > 0, "a height that is none"
        assert scene.width > 0, "a width that is none"
        assert scene.second is None or 0 <= scene.second < 1e9, "a second that is none"
    for person in (*found.people, *(one.person for one in found.matches)):
        assert person.box.shape == (4,), "a box that is none"
        assert np.isfinite(person.box).all(), "a box that is not finite"
        assert 0 <= person.score <= 1, "a score that is none"
    for match in found.matches:
        assert abs(match.similarity) <= 1.01, "a similarity that is none"
    lengths = np.linalg.norm(found.embeddings.astype(np.float64), axis=1)
    assert np.allclose(lengths, 1, atol=1e-2), "an embedding that has not length one"


def _write_gallery(folder: Path) -> None:
    """What an indexing process writes, in a copy."""
    from alignps_jax.gallery.claims import Claims
    from alignps_jax.gallery.store import Gallery
    from alignps_jax.gallery.table import IndexedScene
    from alignps_jax.gallery.writing import commit_scenes
    from tests.gallery.finder import Finder

    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "g", copy)
    gallery = Gallery.open(copy, create_for=Finder())
    assert Claims(gallery).others() is not None
    scene = Scene(scene_id("/new.jpg", None), "/new.jpg", 90, 120, None, "", None)
    commit_scenes(gallery, [IndexedScene(scene, FileState(10, 1, "new"), _people(99))])
    found = gallery.people(scene.id)
    assert len(found) == _PEOPLE, "people who were not written"


def damage_gallery(rng: random.Random, data: bytes) -> bytes:
    """Changes of bytes, and of the description of what made the gallery, with its length kept."""
    about = _ABOUT.search(data)
    if about is None or rng.random() < 0.6:
        return damage(rng, data)
    changed = damage_json(rng, about[0])[: len(about[0])]
    return data[: about.start()] + changed.ljust(len(about[0])) + data[about.end() :]


def _videos(folder: Path) -> Sequence[Path]:
    from tests.gallery.networks import photo, write_video

    frames = [photo(seed, 32, 48) for seed in range(12)]
    for suffix in (".mp4", ".avi", ".mov", ".mkv"):
        write_video(folder / f"a{suffix}", frames)
    return sorted(folder.iterdir())


def _read_video(path: Path) -> list[np.ndarray]:
    """What indexing and the page take from a video."""
    from alignps_jax.gallery.pixels import open_video
    from alignps_jax.gallery.reading import video_tasks
    from alignps_jax.gallery.sources import MediaFile

    about = path.stat()
    file = MediaFile(str(path), about.st_size, about.st_mtime_ns)
    reads = [task() for task in video_tasks(file, 0.4, _MAX_PIXELS)]
    errors = [read.error for read in reads if read.error is not None]
    with open_video(str(path), _MAX_PIXELS) as video:
        frame = video.frame_at(1.0)
    if errors:
        raise errors[0]
    images = [read.image for read in reads if read.image is not None]
    return images if frame is None else [*images, frame]


def _check_frames(images: list[np.ndarray]) -> None:
    for image in images:
        assert image.dtype == np.uint8, "the type of the pixels"
        assert image.ndim == 3, "the shape of a frame"
        assert image.shape[2] == 3, "the colors of a frame"
        assert 0 < image.shape[0] * image.shape[1] <= _MAX_PIXELS, "the size of a frame"


# The threads of LanceDB, JAX and FFmpeg take room but no memory.
GALLERY_READERS: dict[str, Reader] = {
    "gallery": Reader(
        build=_gallery,
        read=lambda folder, _: _read_gallery(folder),
        check=_check_gallery,
        damage=damage_gallery,
        seconds=30.0,
        memory=16 << 30,
        mixes=True,
    ),
    "gallery_writing": Reader(
        build=_gallery,
        read=lambda folder, _: _write_gallery(folder),
        check=lambda _: None,
        damage=damage_gallery,
        seconds=30.0,
        memory=16 << 30,
        mixes=True,
    ),
    "videos": Reader(
        build=_videos,
        read=lambda _, path: _read_video(path),
        check=_check_frames,
        damage=damage,
        memory=4 << 30,
    ),
}
if not _HAS_EXTRA:
    GALLERY_READERS.clear()
