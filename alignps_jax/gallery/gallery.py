"""A gallery: everybody who was found in photos and videos, to be searched and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import load
from alignps_jax.gallery.entries import Filter, GalleryInfo, Match, Scene
from alignps_jax.gallery.memory import PeopleInMemory
from alignps_jax.gallery.people import People
from alignps_jax.inference.detector import Detector
from alignps_jax.media.photos import Image, read_photo
from alignps_jax.media.videos import frame_at
from alignps_jax.types import AnyArray

# A larger gallery that grows is read at most once per 20 times what reading takes.
_QUICKLY_READ, _PATIENCE = 50_000, 20.0

Place = str | os.PathLike[str]


class Gallery:
    """The people of a gallery; calls see the newest commit, in a large one that grows soon.

    `calibration` says what similarities mean, if the detector's checkpoint was evaluated.
    """

    def __init__(self, people: People, detector: Detector | None = None):
        self.people, self.detector = people, detector
        self.address, self.info = people.address, people.info
        self.calibration = load(detector.folder) if detector else None
        self._memory: PeopleInMemory | None = None
        self._lock = threading.Lock()
        if detector and (found := info_of(detector)) != self.info:
            raise UserError(
                f"--gallery: {self.address} was made by {self.info}; found {found}; expected "
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

    def memory(self) -> PeopleInMemory:
        """The people as of one moment, read anew where they have changed."""
        known = self._memory
        if known and (known.version == self.people.version or self._may_wait(known)):
            return known
        with self._lock:
            if self._memory is None or self._memory.version != self.people.version:
                self._memory = PeopleInMemory(self.people)
            return self._memory

    def _may_wait(self, known: PeopleInMemory) -> bool:
        """A large one that grows need not be the newest, but nobody who was forgotten is found."""
        is_early = time.monotonic() < known.since + _PATIENCE * known.took or self._lock.locked()
        is_large = len(known) > _QUICKLY_READ
        return is_large and is_early and known.forgotten == self.people.forgotten.version

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
        return [self.judged(some, where) for some in self.memory().search(queries, k, where)]

    def search_photo(
        self, photo: Image, box: Sequence[float] | None, k: int, where: Filter | None = None
    ) -> list[Match]:
        """`search` for the person in a box (x1, y1, x2, y2) of an RGB photo, or its surest one."""
        from alignps_jax.gallery.search import wanted_people  # a room above this one

        found = wanted_people(self.own_detector(), photo, box)
        return self.search(found.embeddings[0], k, where)

    def judged(self, matches: Sequence[Match], where: Filter | None = None) -> list[Match]:
        """The results of one search, best first, with the probability that each is right.

        Who leaves out some of what a search gave asks again: it depends on the best one.
        """
        if not self.calibration:
            return list(matches)
        similarity = np.array([one.similarity for one in matches])
        shares = self.calibration.results(similarity, self.memory().count(where)).tolist()
        pairs = zip(matches, shares, strict=True)
        return [dataclasses.replace(one, probability=share) for one, share in pairs]

    @property
    def recall(self) -> float | None:
        """None: searches are exact; else the share of the ten best found by the vector index."""
        is_exact = self.memory().embeddings is not None
        return None if is_exact else self.people.trained().get("recall")

    def add(self, paths: Place | Iterable[Place], every: float = 1.0) -> dict[str, str]:
        """`index` of photos, videos and folders; returns what could not be read, with reasons."""
        from alignps_jax.gallery.index import index  # a room above this one

        some = [paths] if isinstance(paths, str | os.PathLike) else paths
        return index(self, [os.fspath(path) for path in some], every).walk.skipped

    def embeddings(self, people: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The embeddings of people (their ids), in that order; UserError if one is not there."""
        rows = self.people.table.rows(["id", "embedding"], id=people).to_pylist()
        found = {row["id"]: row["embedding"] for row in rows}
        if missing := set(people) - found.keys():
            raise UserError(f"{self.address}: found nobody with the id {missing.pop()!r}")
        return np.array([found[one] for one in people], np.float32).reshape(-1, self.info.dim)

    def file_of(self, scene: Scene) -> Path:
        """A file with a scene's content that is as it was indexed; UserError if none is."""
        rows = self.people.files.rows(["path", "size", "mtime"], hash=[scene.hash])
        for path, *known in zip(*rows.to_pydict().values(), strict=True):
            with contextlib.suppress(OSError):
                found = os.stat(path)
                if [found.st_size, found.st_mtime_ns] == known:
                    return Path(path)
        raise UserError(f"{scene.path}: has changed since it was indexed, or cannot be found")

    def pixels(self, scene: Scene, side: int = 0) -> Image:
        """The photo, at most `side` pixels long if given, or the video's frame, RGB; UserError."""
        path, most = self.file_of(scene), scene.height * scene.width
        if scene.second is not None:
            return frame_at(str(path), scene.second, most)
        return read_photo(path, most, side)


def info_of(detector: Detector) -> GalleryInfo:
    """A detector as a gallery knows it."""
    config = detector.config
    scale = "{}x{}".format(*config.data.test_scale)
    dim = config.model.channels * (1 + (config.model.roi and config.eval.branch == "both"))
    threshold = config.eval.score_threshold
    return GalleryInfo(detector.fingerprint, detector.name, scale, threshold, dim)
