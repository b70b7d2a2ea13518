"""A gallery in memory: scenes, people and, if there is room, embeddings for exact search."""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.gallery.entries import Filter, Person, Scene, person_id
from alignps_jax.gallery.people import FILE, SCENE, SCENE_COLUMNS, People, scene_of
from alignps_jax.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.types import AnyArray

# Fewer results than that are computed as if they were so many: one program for all of them.
_LEAST_RESULTS = 64
_ALIGNMENT = 64  # bytes, with which JAX takes an array on a CPU as it is
_ORDER = [("taken", "descending"), ("path", "ascending"), ("second", "ascending")]


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleInMemory:
    """N people in S scenes, as loaded in `took` seconds.

    `scenes` has `SCENE_COLUMNS`, newest first, those of unknown time last, `content` a number for
    the content of each, `paths` the files of contents that have several. `scene` is each person's
    row in `scenes` (-1: none), `embeddings` are on the device, with room for more so that few
    shapes are compiled; None where they do not fit into memory.
    """

    version: tuple[int, int]
    took: float
    scenes: pa.Table
    content: Int[np.ndarray, "S"]
    paths: dict[str, list[str]]
    scene: Int[np.ndarray, "N"]
    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, "N"]
    embeddings: Float[Array, "C D"] | None
    _cards: dict[Filter, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

    def search(
        self, queries: Float[AnyArray, "Q D"], k: int, where: Filter
    ) -> list[list[tuple[Person, float]]]:
        """For each query the k most similar people and their similarities, best first."""
        assert self.embeddings is not None
        wanted = min(len(self), k)
        if wanted == 0 or len(queries) == 0:
            return [[] for _ in queries]
        rows = power_of_two_from(len(queries))
        padded = np.pad(np.asarray(queries, np.float32), ((0, rows - len(queries)), (0, 0)))
        among = np.zeros(len(self.embeddings), bool)
        among[: len(self)] = self.matching(where)
        most = min(len(among), power_of_two_from(max(wanted, _LEAST_RESULTS)))
        found = jax.device_get(top_k(padded, self.embeddings, most, among=among))
        results = []
        for index, similarity in zip(found.index, found.similarity, strict=True):
            exists = np.isfinite(similarity[:wanted])
            people = self.people(index[:wanted][exists])
            results.append(list(zip(people, similarity[:wanted][exists].tolist(), strict=True)))
        return results[: len(queries)]

    def matching(self, where: Filter) -> Bool[np.ndarray, "N"]:
        """Who passes a filter."""
        scenes = self._scenes_matching(dataclasses.replace(where, min_score=None))
        # Whoever has no scene (-1) is about to get one, or to go.
        matching = np.append(scenes, False)[self.scene]
        if where.min_score is not None:
            matching &= self.scores >= np.float32(where.min_score)
        return matching

    def _scenes_matching(self, where: Filter) -> Bool[np.ndarray, "S"]:
        """Which scenes pass a filter; by score, where somebody does."""
        matching = np.ones(len(self.scenes), bool)
        if conditions := where.condition(pc.field, self.copied(where)):
            rows = self.scenes.append_column("row", pa.array(np.arange(len(matching))))
            matching[:] = False
            matching[rows.filter(functools.reduce(operator.and_, conditions))["row"]] = True
        if where.min_score is not None:
            scored = np.zeros(len(matching) + 1, bool)
            scored[self.scene[self.scores >= np.float32(where.min_score)]] = True
            matching &= scored[:-1]
        return matching

    def copied(self, where: Filter) -> list[str]:
        """The contents of which one of several files lies in the filter's folder."""
        if where.folder is None:
            return []
        low, high = where.below
        return [
            content
            for content, paths in self.paths.items()
            if any(low <= path < high for path in paths)
        ]

    def cards(self, where: Filter) -> tuple[Int[np.ndarray, "c"], Int[np.ndarray, "c"]]:
        """For each photo and video that passes a filter its first row and number of rows."""
        found = self._cards.get(where)
        if found is None:
            rows = np.flatnonzero(self._scenes_matching(where))
            _, first, count = np.unique(self.content[rows], return_index=True, return_counts=True)
            order = np.argsort(first)
            found = rows[first[order]], count[order]
            self._cards.clear()  # whoever scrolls asks for the same again
            self._cards[where] = found
        return found

    def people(self, rows: Int[np.ndarray, "k"]) -> list[Person]:
        """The people of some rows."""
        needed, place = np.unique(self.scene[rows], return_inverse=True)
        scenes = self.scenes_of(needed)
        return [
            Person(
                id=person_id(scenes[at].id, self.boxes[row]),
                scene=scenes[at],
                box=self.boxes[row],
                score=float(self.scores[row]),
            )
            for row, at in zip(rows.tolist(), place.tolist(), strict=True)
        ]

    def people_of(self, scene: str) -> list[Person]:
        """The people of a scene (its id), best score first."""
        place = pc.index(self.scenes["scene"], scene).as_py()
        rows = np.flatnonzero((self.scene == place) & (place >= 0))
        return self.people(rows[np.argsort(-self.scores[rows], kind="stable")])

    def person(self, identity: str) -> Person | None:
        """The person of an id."""
        people = self.people_of(identity.partition("-")[0])
        return next((person for person in people if person.id == identity), None)

    def scenes_of(self, rows: Int[np.ndarray, "k"]) -> list[Scene]:
        """The scenes of some rows of `scenes`."""
        return [scene_of(row) for row in self.scenes.take(pa.array(rows)).to_pylist()]

    def scenes_with(self, column: str, value: str) -> list[Scene]:
        """The scenes with that value in a column."""
        return self.scenes_of(np.flatnonzero(pc.equal(self.scenes[column], value)))

    def paths_of(self, scene: Scene) -> tuple[str, ...]:
        """All files of a scene, its own path first."""
        return tuple(dict.fromkeys((scene.path, *self.paths.get(scene.hash, ()))))


def fits(people: int, dim: int) -> bool:
    """Whether the embeddings of so many people take at most half of the free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    free = min(free, stats.get("bytes_limit", free) - stats.get("bytes_in_use", 0))
    return _capacity(people) * dim * 4 <= free // 2


def load_people(people: People) -> PeopleInMemory:
    """A gallery as it is now."""
    start, dim = time.perf_counter(), people.info.dim
    # In this order, since a scene is committed after its people.
    tables = people.scenes.pinned(), people.table.pinned()
    files = tables[0].rows(["path", "hash"], kind=FILE)
    scenes = tables[0].rows([*SCENE_COLUMNS, "every"], kind=SCENE).sort_by(_ORDER)
    ids, count = scenes["scene"].combine_chunks(), tables[1].count()
    boxes, scores = np.empty((count, 4), np.float32), np.empty(count, np.float32)
    embeddings = _aligned((_capacity(count), dim)) if fits(count, dim) else None
    columns = ["scene", "score", "box", *["embedding"] * (embeddings is not None)]
    owners, row = [], 0
    for batch in tables[1].batches(columns):
        rows = slice(row, row + len(batch))
        owners.append(batch.column("scene"))
        scores[rows] = batch.column("score")
        boxes[rows] = batch.column("box").flatten().to_numpy().reshape(-1, 4)
        if embeddings is not None:
            embeddings[rows] = batch.column("embedding").flatten().to_numpy().reshape(-1, dim)
        row += len(batch)
    owner = pc.index_in(pa.chunked_array(owners, pa.string()), value_set=ids)
    return PeopleInMemory(
        version=(tables[0].version, tables[1].version),
        took=time.perf_counter() - start,
        scenes=scenes,
        content=_numbers(scenes["hash"]),
        paths=_copies(files),
        scene=owner.fill_null(-1).to_numpy(),
        boxes=boxes,
        scores=scores,
        embeddings=None if embeddings is None else jnp.asarray(embeddings),
    )


def _numbers(texts: pa.ChunkedArray) -> Int[np.ndarray, "S"]:
    indices: Int[np.ndarray, "S"] = texts.combine_chunks().dictionary_encode().indices.to_numpy()
    return indices


def _copies(files: pa.Table) -> dict[str, list[str]]:
    """The files of each content that has several."""
    counts = pc.value_counts(files["hash"])
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    paths = defaultdict(list)
    for row in files.filter(pc.is_in(files["hash"], several)).sort_by("path").to_pylist():
        paths[row["hash"]].append(row["path"])
    return dict(paths)


def _capacity(count: int) -> int:
    """Room for so many: an eighth more at most where there are many, in few different sizes."""
    step = max(1024, power_of_two_from(count) // 8)
    return max(CHUNK if count > CHUNK else 1024, -(-count // step) * step)


def _aligned(shape: tuple[int, int]) -> Float[np.ndarray, "C D"]:
    """Zeros that JAX takes without a copy."""
    size = shape[0] * shape[1] * 4
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
