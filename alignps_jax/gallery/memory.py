"""A gallery in memory: scenes, people and, if there is room, embeddings for exact search."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.gallery.entries import Filter, Match, Person, Scene, person_id
from alignps_jax.gallery.people import People
from alignps_jax.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.types import AnyArray

_SCENE = [field.name for field in dataclasses.fields(Scene)]
_ORDER = [("taken", "descending"), ("path", "ascending"), ("second", "ascending")]


@dataclasses.dataclass(frozen=True)
class SceneCard:
    """A photo, or a video by its latest frame, and the number of its frames."""

    scene: Scene
    frames: int


class PeopleInMemory:
    """N people and their scenes, as they are when this is made, `since` when and in `took` seconds.

    `scenes` is a table with the best score of each, newest first, those of unknown time last;
    `scene` (Int[N]) is each person's row in it, `boxes` (Float[N 4]) and `scores` are the people's;
    `embeddings` (Float[C D]) are on the device, with room for more; None where they do not fit.
    """

    def __init__(self, people: People):
        start, self._people = time.monotonic(), people
        self.version, self.forgotten = people.version, people.forgotten.version
        # In this order, since a scene is committed after its people. What comes meanwhile makes
        # another version, and is read next time.
        self._contents, scenes = people.contents(), people.scenes.rows()
        owner = pc.index_in(scenes["hash"], self._contents["hash"].combine_chunks())
        paths = self._contents["paths"].take(owner)
        scenes = scenes.append_column("path", pc.list_element(paths, 0))
        scenes = scenes.append_column("copies", pc.list_slice(paths, 1))
        scenes = scenes.filter(owner.is_valid()).sort_by(_ORDER)
        has_room = fits(people.table.count(), people.info.dim)
        found = people.table.rows(["scene", "score", "box", *["embedding"] * has_room])
        owner = pc.index_in(found["scene"], scenes["id"].combine_chunks())
        if owner.null_count:  # a scene that is not committed yet, or is being removed
            found, owner = found.filter(owner.is_valid()), owner.drop_null()
        self.scene, self.scores = owner.to_numpy(), found["score"].to_numpy()
        self.boxes = pc.list_flatten(found["box"]).to_numpy().reshape(-1, 4)
        best, rows = np.full(len(scenes), -1, np.float32), pa.array(np.arange(len(scenes)))
        np.maximum.at(best, self.scene, self.scores)
        self.scenes = scenes.append_column("score", pa.array(best)).append_column("row", rows)
        self.embeddings = _on_device(found["embedding"], people.info.dim) if has_room else None
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
        for index, similarity in zip(found.index, found.similarity[:, :k], strict=True):
            exists = np.isfinite(similarity)
            people = self.people(index[:k][exists])
            results.append(list(map(Match, people, similarity[exists].tolist())))
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
        condition = where.condition(pc.field, self._inside(where))
        return self.scenes if condition is None else self.scenes.filter(condition)

    def _inside(self, where: Filter) -> pa.Array:
        """The hashes of files in the folder of a filter, if it has one."""
        if where.folder is None:
            return pa.array([], pa.string())
        paths = self._contents["paths"].combine_chunks()
        is_inside = pc.starts_with(
            paths.flatten(), os.path.join(os.path.normpath(where.folder), "")
        )
        rows = pc.list_parent_indices(paths).filter(is_inside)
        return self._contents["hash"].take(rows).combine_chunks()


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
