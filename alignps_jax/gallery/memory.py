"""A gallery in memory: scenes, people and, if there is room, embeddings for exact search."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.gallery.entries import Filter, Person, Scene, person_id
from alignps_jax.gallery.people import People
from alignps_jax.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.types import AnyArray

_SCENE = [field.name for field in dataclasses.fields(Scene)]
_ORDER = [("taken", "descending"), ("path", "ascending"), ("second", "ascending")]


class PeopleInMemory:
    """N people and their scenes, as they are when this is made, in `took` seconds.

    `scenes` is a table with the best score of each, newest first, those of unknown time last;
    `paths` are all files of each content that has several; `scene` (Int[N]) is each person's row in
    `scenes`, `boxes` (Float[N 4]) and `scores` are the people's; `embeddings` (Float[C D]) are on
    the device, with room for more; None where they do not fit.
    """

    def __init__(self, people: People):
        start, self.version = time.perf_counter(), people.version
        # In this order, since a scene is committed after its people. What comes meanwhile makes
        # another version, and is read next time.
        files = people.files.rows(["path", "hash"]).sort_by("path")
        groups = files.group_by("hash", use_threads=False).aggregate([("path", "list")])
        several = groups.filter(pc.list_value_length(pc.field("path_list")) > 1)
        self.paths = {row["hash"]: row["path_list"] for row in several.to_pylist()}
        scenes = people.scenes.rows([*_SCENE, "every"]).sort_by(_ORDER)
        has_room = fits(people.table.count(), people.info.dim)
        found = people.table.rows(["scene", "score", "box", *["embedding"] * has_room])
        owner = pc.index_in(found["scene"], value_set=scenes["id"].combine_chunks())
        if owner.null_count:  # a scene that is not committed yet, or is being removed
            found, owner = found.filter(owner.is_valid()), owner.drop_null()
        self.scene, self.scores = owner.to_numpy(), found["score"].to_numpy()
        self.boxes = pc.list_flatten(found["box"]).to_numpy().reshape(-1, 4)
        best, rows = np.full(len(scenes), -1, np.float32), pa.array(np.arange(len(scenes)))
        np.maximum.at(best, self.scene, self.scores)
        self.scenes = scenes.append_column("score", pa.array(best)).append_column("row", rows)
        self.embeddings = _on_device(found["embedding"], people.info.dim) if has_room else None
        self.took = time.perf_counter() - start

    def __len__(self) -> int:
        return len(self.scores)

    def search(
        self, queries: Float[AnyArray, "Q D"], k: int, where: Filter
    ) -> list[list[tuple[Person, float]]]:
        """For each query the k most similar people and their similarities, best first."""
        assert self.embeddings is not None
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
            results.append(list(zip(people, similarity[exists].tolist(), strict=True)))
        return results[: len(queries)]

    def matching(self, where: Filter) -> Bool[np.ndarray, "N"]:
        """Who passes a filter."""
        passes = np.zeros(len(self.scenes), bool)
        passes[self._passing(where)["row"]] = True
        return passes[self.scene] & (self.scores >= np.float32(where.min_score or -1))

    def _passing(self, where: Filter) -> pa.Table:
        """The scenes that do, by score where somebody does, in any order."""
        condition = where.condition(pc.field, self.paths)
        return self.scenes if condition is None else self.scenes.filter(condition)

    def cards(self, where: Filter) -> tuple[Int[np.ndarray, "c"], Int[np.ndarray, "c"]]:
        """For each photo and video that passes a filter its first row and number of rows."""
        found = self._passing(where).group_by("hash").aggregate([("row", "min"), ("row", "count")])
        found = found.sort_by("row_min")
        return found["row_min"].to_numpy(), found["row_count"].to_numpy()

    def people(self, rows: Int[np.ndarray, "k"]) -> list[Person]:
        """The people of some rows."""
        needed, place = np.unique(self.scene[rows], return_inverse=True)
        scenes, scores = self.scenes_of(needed), self.scores[rows].tolist()
        return [
            Person(person_id(scenes[at].id, box), scenes[at], box, score)
            for at, box, score in zip(place, self.boxes[rows], scores, strict=True)
        ]

    def people_of(self, scene: str) -> list[Person]:
        """The people of a scene (its id), best score first."""
        rows = np.flatnonzero(self.scene == pc.index(self.scenes["id"], scene).as_py())
        return self.people(rows[np.argsort(-self.scores[rows], kind="stable")])

    def scenes_of(self, rows: Int[np.ndarray, "k"]) -> list[Scene]:
        """The scenes of some rows of `scenes`."""
        return [Scene(**row) for row in self.scenes.select(_SCENE).take(rows).to_pylist()]

    def scenes_with(self, column: str, value: str) -> list[Scene]:
        """The scenes with that value in a column."""
        return self.scenes_of(np.flatnonzero(pc.equal(self.scenes[column], value)))

    def paths_of(self, scene: Scene) -> tuple[str, ...]:
        """All files of a scene, its own path first."""
        return tuple(dict.fromkeys((scene.path, *self.paths.get(scene.hash, ()))))


def _on_device(embeddings: pa.ChunkedArray, dim: int) -> Float[Array, "C D"]:
    """Embeddings with room for more: a program is compiled for each number of chunks."""
    room = -(-max(1, len(embeddings)) // CHUNK) * CHUNK
    parts = [chunk.flatten().to_numpy() for chunk in embeddings.chunks]
    # JAX takes what Arrow has aligned without a copy.
    found = np.frombuffer(pa.allocate_buffer(room * dim * 4), np.float32)
    np.concatenate([*parts, np.zeros((room - len(embeddings)) * dim, np.float32)], out=found)
    return jnp.asarray(found.reshape(room, dim))


def fits(people: int, dim: int) -> bool:
    """Whether the embeddings of this many people take at most half of the free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    free = min(free, stats.get("bytes_limit", free) - stats.get("bytes_in_use", 0))
    return people * dim * 4 <= free // 2
