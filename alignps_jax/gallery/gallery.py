"""A gallery: everybody who was found in photos and videos, to be searched and looked up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Self

import numpy as np
from jaxtyping import Float
from lancedb.expr import col

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import load
from alignps_jax.gallery.entries import Filter, GalleryInfo, Match, Person, Scene
from alignps_jax.gallery.memory import PeopleInMemory
from alignps_jax.gallery.people import People
from alignps_jax.inference.detector import Detector
from alignps_jax.media import Image, read_photo
from alignps_jax.types import AnyArray

# A larger gallery that grows is reloaded at most once per 20 times its loading time.
_QUICKLY_READ, _PATIENCE = 50_000, 20.0

Place = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class SceneCard:
    """A photo, or a video by its latest frame, and the number of its frames."""

    scene: Scene
    frames: int


class Gallery:
    """The people of a gallery; calls see the newest commit, in a large one that grows soon.

    `calibration` says what similarities mean, if the detector's checkpoint was evaluated.
    """

    def __init__(self, people: People, detector: Detector | None = None):
        self.people, self.detector = people, detector
        self.address, self.info = people.address, info_of(detector) if detector else people.info
        self.calibration = load(detector.folder) if detector else None
        self._memory: PeopleInMemory | None = None
        self._next, self._forgotten = 0.0, 0
        self._lock = threading.Lock()
        if self.info != people.info:
            raise UserError(
                f"--gallery: {self.address} was made by {people.info}; found {self.info}; expected "
                "the same, or another gallery"
            )

    @classmethod
    def open(cls, address: Place, detector: Detector | None = None, create: bool = False) -> Self:
        """Opens a gallery: a folder such as people.lance, s3://bucket/people.lance, or memory://.

        A detector, which has to be the one that made it, adds and searches photos; `create`: there
        need not be a gallery yet.
        """
        info = info_of(detector) if create and detector else None
        return cls(People(os.fspath(address), info), detector)

    def own_detector(self) -> Detector:
        """The detector; UserError without one."""
        if self.detector is None:
            raise UserError(f"{self.address}: expected Gallery.open(..., detector=detector)")
        return self.detector

    @property
    def version(self) -> tuple[int, ...]:
        """Changes with every commit."""
        return self.people.version

    @property
    def num_people(self) -> int:
        """The number of people."""
        return self.people.table.count()

    @property
    def num_scenes(self) -> int:
        """The number of photos and frames, those of nobody included."""
        return self.people.scenes.count()

    def search(
        self, embedding: Float[AnyArray, "D"], k: int, where: Filter | None = None
    ) -> list[Match]:
        """The k people that are most similar to an embedding of length one, best first."""
        return self.search_many(np.asarray(embedding)[None], k, where)[0]

    def search_many(
        self, embeddings: Float[AnyArray, "Q D"], k: int, where: Filter | None = None
    ) -> list[list[Match]]:
        """The same for each of several embeddings; UserError if they are of another detector."""
        queries, where = np.asarray(embeddings, np.float32), where or Filter()
        if queries.ndim != 2 or queries.shape[1] != self.info.dim or k < 1:
            raise UserError(
                f"gallery search: found embeddings of shape {queries.shape}, k = {k}, "
                f"expected (queries, {self.info.dim}), k from 1"
            )
        memory = self.memory()
        if memory.embeddings is not None:
            found = memory.search(queries, k, where)
        else:
            wanted = where.condition(col, memory.paths)
            found = [
                [
                    (person, similarity)
                    for identity, similarity in self.people.nearest(query, k, wanted)
                    if (person := self.person(identity))
                ]
                for query in queries
            ]
        results = [
            [Match(one, similar, paths=memory.paths_of(one.scene)) for one, similar in matches]
            for matches in found
        ]
        return [self.judged(matches, where) for matches in results]

    def judged(self, matches: Sequence[Match], where: Filter | None = None) -> list[Match]:
        """The results of one search, best first, with the probability that each is right.

        Who leaves out some of what a search gave asks again: it depends on the best one.
        """
        if not self.calibration:
            return list(matches)
        similarity = np.array([one.similarity for one in matches])
        shares = self.calibration.results(similarity, self.searched(where)).tolist()
        pairs = zip(matches, shares, strict=True)
        return [dataclasses.replace(one, probability=share) for one, share in pairs]

    def searched(self, where: Filter | None = None) -> int:
        """The number of people who pass a filter."""
        return int(self.memory().matching(where or Filter()).sum())

    @property
    def recall(self) -> float | None:
        """None: searches are exact; else the share of the ten best found by the vector index."""
        is_exact = self.memory().embeddings is not None
        return None if is_exact else self.people.trained().get("recall")

    def memory(self) -> PeopleInMemory:
        """The people in memory, read anew where they have changed."""
        known = self._memory
        if known is not None and known.version == self.version:
            return known
        forgotten = len(self.people.notes("forgotten").all())
        # A large one takes long, and others may read it; but nobody who was forgotten is found.
        may_wait = time.monotonic() < self._next or self._lock.locked()
        if may_wait and known and len(known) > _QUICKLY_READ and forgotten == self._forgotten:
            return known
        with self._lock:
            if self._memory is None or self._memory.version != self.version:
                self._memory, self._forgotten = PeopleInMemory(self.people), forgotten
                self._next = time.monotonic() + _PATIENCE * self._memory.took
            return self._memory

    def add(self, paths: Place | Iterable[Place], every: float = 1.0) -> dict[str, str]:
        """`index` of photos, videos and folders; returns what could not be read, with reasons."""
        from alignps_jax.gallery.index import index  # a room above this one

        some = [paths] if isinstance(paths, str | os.PathLike) else paths
        return index(self, [os.fspath(path) for path in some], every).walk.skipped

    def search_photo(
        self, photo: Image, box: Sequence[float] | None, k: int, where: Filter | None = None
    ) -> list[Match]:
        """`search` for the person in a box (x1, y1, x2, y2) of an RGB photo, or its surest one."""
        from alignps_jax.gallery.search import wanted_people  # a room above this one

        found = wanted_people(self.own_detector(), photo, "the photo", box)
        return self.search(found.embeddings[0], k, where)

    def scene(self, identity: str) -> Scene | None:
        """The scene of an id."""
        return next(iter(self.memory().scenes_with("id", identity)), None)

    def scenes_of(self, content: str) -> list[Scene]:
        """The photo, or the frames of the video in their order, with that hash of its file."""
        found = self.memory().scenes_with("hash", content)
        return sorted(found, key=lambda scene: scene.second or 0.0)

    def person(self, identity: str) -> Person | None:
        """The person of an id."""
        people = self.people_of(identity.partition("-")[0])
        return next((person for person in people if person.id == identity), None)

    def people_of(self, scene: str) -> list[Person]:
        """The people of a scene (its id), best score first."""
        return self.memory().people_of(scene)

    def embeddings(self, people: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The embeddings of people (their ids), in that order; UserError if one is not there."""
        rows = self.people.table.rows(["id", "embedding"], id=people).to_pylist()
        found = {row["id"]: row["embedding"] for row in rows}
        if missing := set(people) - found.keys():
            raise UserError(f"{self.address}: found nobody with the id {missing.pop()!r}")
        return np.array([found[one] for one in people], np.float32).reshape(-1, self.info.dim)

    def scenes(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[SceneCard]:
        """Some of the photos and videos, newest first, those of unknown time last, by path."""
        memory, some = self.memory(), slice(offset, offset + limit)
        rows, frames = memory.cards(where or Filter())
        return list(map(SceneCard, memory.scenes_of(rows[some]), frames[some].tolist()))

    def cameras(self) -> list[str]:
        """The names of all known cameras, sorted."""
        return sorted(filter(None, self.memory().scenes["camera"].unique().to_pylist()))

    def folders(self) -> list[str]:
        """The folders that scenes lie in, and those above them, sorted."""
        paths = self.memory().scenes["path"].unique().to_pylist()
        return sorted({str(folder) for path in paths for folder in PurePath(path).parents})

    def file_of(self, scene: Scene) -> Path:
        """The first file with a scene's content that is as it was indexed; UserError if none is."""
        rows = self.people.files.rows(["path", "size", "mtime"], hash=[scene.hash])
        for row in sorted(rows.to_pylist(), key=lambda row: row["path"] != scene.path):
            with contextlib.suppress(OSError):
                found = os.stat(row["path"])
                if (found.st_size, found.st_mtime_ns) == (row["size"], row["mtime"]):
                    return Path(row["path"])
        raise UserError(f"{scene.path}: has changed since it was indexed, or cannot be found")

    def pixels(self, scene: Scene, side: int = 0) -> Image:
        """The photo (`side`: see `decode_photo`) or the video's frame, RGB; UserError."""
        path, most = self.file_of(scene), self.info.max_pixels
        return read_photo(path, most, side, scene.second)


def info_of(detector: Detector) -> GalleryInfo:
    """A detector as a gallery knows it."""
    config = detector.config
    long, short = config.data.test_scale
    branches = 1 + (config.model.roi and config.eval.branch == "both")
    return GalleryInfo(
        checkpoint=detector.fingerprint,
        name=detector.name,
        test_scale=(int(long), int(short)),
        score_threshold=float(config.eval.score_threshold),
        dim=branches * int(config.model.channels),
        max_pixels=int(config.data.max_pixels),
    )
