"""A gallery: everybody who was found in photos and videos, to be searched and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import load
from alignps_jax.gallery.entries import Filter, GalleryInfo, Match, Person, Scene, person_id
from alignps_jax.gallery.people import People
from alignps_jax.inference.detector import Detector
from alignps_jax.media import Image, read_photo
from alignps_jax.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.types import AnyArray

_SCENE = [field.name for field in dataclasses.fields(Scene)]
_ORDER = [("taken", "descending"), ("path", "ascending"), ("second", "ascending")]
# A larger gallery that grows is read at most once per 20 times what reading takes.
QUICKLY_READ, PATIENCE = 50_000, 20.0

Place = str | os.PathLike[str]
Corners = Sequence[float] | Float[np.ndarray, "4"]  # x1, y1, x2, y2 in pixels


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
            raise UserError(f"--gallery: {self.address}: found {found}, expected {self.info}")

    @classmethod
    def open(cls, address: Place, detector: Detector | None = None, create: bool = False) -> Self:
        """Opens a folder such as people.lance, s3://bucket/people.lance, or memory://.

        The detector that made it adds and searches photos; `create`: there need not be one yet.
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
        is_early = time.monotonic() < known.since + PATIENCE * known.took or self._lock.locked()
        is_large = len(known) > QUICKLY_READ
        return is_large and is_early and known.forgotten == self.people.forgotten.version

    def search(
        self, embedding: Float[AnyArray, "D"], k: int, where: Filter | None = None
    ) -> list[Match]:
        """The k people that are most similar to an embedding of length one, best first."""
        return self.search_many(np.asarray(embedding)[None], k, where)[0]

    def search_many(
        self, embeddings: Float[AnyArray, "Q D"], k: int, where: Filter | None = None
    ) -> list[list[Match]]:
        """The same for each of several embeddings; UserError if these have another length."""
        found = self.memory().search(np.asarray(embeddings, np.float32), k, where or Filter())
        return [self.judged(matches, where) for matches in found]

    def search_photo(
        self, photo: Image, box: Corners | None, k: int, where: Filter | None = None
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
        """The photo (`side`: see `decode_photo`) or the video's frame, RGB; UserError."""
        path, most = self.file_of(scene), sys.maxsize  # pixels: it was small enough when indexed
        return read_photo(path, most, side, scene.second)


def info_of(detector: Detector) -> GalleryInfo:
    """A detector as a gallery knows it."""
    config = detector.config
    scale = "{}x{}".format(*config.data.test_scale)
    dim = config.model.channels * (1 + (config.model.roi and config.eval.branch == "both"))
    threshold = config.eval.score_threshold
    return GalleryInfo(detector.fingerprint, detector.name, scale, threshold, dim)


@dataclasses.dataclass(frozen=True)
class SceneCard:
    """A photo, or a video by its latest frame, and the number of its frames."""

    scene: Scene
    frames: int


class PeopleInMemory:
    """N people and their scenes, as they are when this is made, `since` when and in `took` seconds.

    `scenes` is a table, newest first, those of unknown time last; `scene` (Int[N]) is each person's
    row in it; `embeddings` (Float[C D]) are on the device, with room for more, if they fit; else
    `recall` is the share of the ten best that the vector index finds.
    """

    def __init__(self, people: People):
        start, self._people = time.monotonic(), people
        self.version, self.forgotten = people.version, people.forgotten.version
        # In this order, since a scene is committed after its people. What comes meanwhile makes
        # another version, and is read next time.
        self._files = people.files.rows(["hash", "path"]).sort_by("path")
        contents = self._files.group_by("hash", use_threads=False).aggregate([("path", "list")])
        scenes = people.scenes.rows()
        owner = pc.index_in(scenes["hash"], contents["hash"])
        paths = contents["path_list"].take(owner)
        scenes = scenes.append_column("path", pc.list_element(paths, 0))
        scenes = scenes.append_column("copies", pc.list_slice(paths, 1))
        scenes = scenes.filter(owner.is_valid()).sort_by(_ORDER)
        has_room = fits(people.table.count(), people.info.dim)
        found = people.table.rows(["scene", "score", "box", *["embedding"] * has_room])
        owner = pc.index_in(found["scene"], scenes["id"])
        if owner.null_count:  # a scene that is not committed yet, or is being removed
            found, owner = found.filter(owner.is_valid()), owner.drop_null()
        self.scene, self.scores = owner.to_numpy(), found["score"].to_numpy()
        self.boxes = pc.list_flatten(found["box"]).to_numpy().reshape(-1, 4)
        best, rows = np.full(len(scenes), -1, np.float32), pa.array(np.arange(len(scenes)))
        np.maximum.at(best, self.scene, self.scores)
        self.scenes = scenes.append_column("score", pa.array(best)).append_column("row", rows)
        self.embeddings = _on_device(found["embedding"], people.info.dim) if has_room else None
        self.recall = None if has_room else people.trained().get("recall")
        self.since = time.monotonic()
        self.took = self.since - start

    def __len__(self) -> int:
        return len(self.scores)

    def search(self, queries: Float[AnyArray, "Q D"], k: int, where: Filter) -> list[list[Match]]:
        """The k people that are most similar to each query, best first."""
        if self.embeddings is None:
            inside = self._inside(where).to_pylist()
            near = [self._people.nearest(query, k, where, inside) for query in queries]
            return [[Match(one, some[i]) for i, one in self.named(some).items()] for some in near]
        padded = np.zeros((power_of_two_from(len(queries)), queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        among = np.zeros(len(self.embeddings), bool)
        among[: len(self)] = self.matching(where)
        most = min(len(among), power_of_two_from(max(k, 64)))  # few programs are compiled
        found = jax.device_get(top_k(padded, self.embeddings, most, among=among))
        results = []
        for rows, similarity in zip(found.index[:, :k], found.similarity[:, :k], strict=True):
            exists = np.isfinite(similarity)
            results.append(list(map(Match, self.people(rows[exists]), similarity[exists].tolist())))
        return results[: len(queries)]

    def matching(self, where: Filter) -> Bool[np.ndarray, "N"]:
        """Who passes a filter."""
        passes = np.zeros(len(self.scenes), bool)
        passes[self._passing(where)["row"]] = True
        return passes[self.scene] & (self.scores >= np.float32(where.min_score or -1))

    def count(self, where: Filter | None = None) -> int:
        """The number of people who pass a filter."""
        return int(self.matching(where or Filter()).sum())

    def cards(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[SceneCard]:
        """Some of the photos and videos, newest first, those of unknown time last, by path."""
        groups = self._passing(where or Filter()).group_by("hash")
        found = groups.aggregate([("row", "min"), ("row", "count")]).sort_by("row_min")
        found = found.slice(offset, limit)
        scenes = self._scenes(found["row_min"].to_numpy())
        return list(map(SceneCard, scenes, found["row_count"].to_pylist()))

    def people(self, rows: Int[np.ndarray, "k"]) -> list[Person]:
        """The people of some rows."""
        needed, place = np.unique(self.scene[rows], return_inverse=True)
        scenes, scores = self._scenes(needed), self.scores[rows].tolist()
        return [
            Person(person_id(scenes[at].id, box), scenes[at], box, score)
            for at, box, score in zip(place, self.boxes[rows], scores, strict=True)
        ]

    def people_of(self, *scenes: str) -> list[Person]:
        """The people of scenes (ids), best score first."""
        rows = np.flatnonzero(np.isin(self.scene, self._rows("id", scenes)))
        return self.people(rows[np.argsort(-self.scores[rows], kind="stable")])

    def named(self, ids: Collection[str]) -> dict[str, Person]:
        """People by their ids, in that order; without those who are not there."""
        people = self.people_of(*(one.partition("-")[0] for one in ids))
        known = {person.id: person for person in people}
        return {one: known[one] for one in ids if one in known}

    def person(self, identity: str) -> Person | None:
        """The person of an id."""
        return self.named([identity]).get(identity)

    def scene_of(self, identity: str) -> Scene | None:
        """The scene of an id."""
        return next(iter(self._scenes(self._rows("id", [identity]))), None)

    def scenes_of(self, content: str) -> list[Scene]:
        """The photo, or the frames of the video in their order, with that hash of its file."""
        found = self._scenes(self._rows("hash", [content]))
        return sorted(found, key=lambda scene: scene.second or 0.0)

    def _rows(self, column: str, values: Collection[str]) -> Int[np.ndarray, "k"]:
        """The scenes with one of these values."""
        return np.flatnonzero(pc.is_in(self.scenes[column], pa.array(values, pa.string())))

    def _scenes(self, rows: Int[np.ndarray, "k"]) -> list[Scene]:
        return [Scene(**row) for row in self.scenes.select(_SCENE).take(rows).to_pylist()]

    def _passing(self, where: Filter) -> pa.Table:
        """The scenes that pass a filter, by score where somebody does, in any order."""
        if where == Filter():
            return self.scenes
        return self.scenes.filter(where.condition(pc.field, self._inside(where)))

    def _inside(self, where: Filter) -> pa.Array:
        """The hashes of files in the folder of a filter, if it has one."""
        if where.folder is None:
            return pa.array([], pa.string())
        folder = os.path.join(os.path.normpath(where.folder), "")
        inside = self._files.filter(pc.starts_with(self._files["path"], folder))
        return inside["hash"].combine_chunks()


def _on_device(embeddings: pa.ChunkedArray, dim: int) -> Float[Array, "C D"]:
    """Embeddings with room for more: a program is compiled for each number of chunks."""
    room = -(-max(1, len(embeddings)) // CHUNK) * CHUNK
    more = pa.array(np.zeros((room - len(embeddings)) * dim, np.float32))
    found = pa.concat_arrays([*(chunk.flatten() for chunk in embeddings.chunks), more])
    # JAX takes what Arrow has aligned without a copy.
    return jnp.asarray(found.to_numpy().reshape(room, dim))


def fits(people: int, dim: int) -> bool:
    """Whether the embeddings of this many people take at most half of the free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    free = min(free, stats.get("bytes_limit", free) - stats.get("bytes_in_use", 0))
    return people * dim * 4 <= free // 2
