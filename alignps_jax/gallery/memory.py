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
from pyarrow.dataset import dataset

from alignps_jax.gallery.entries import Filter, Person, Scene, person_id
from alignps_jax.gallery.people import People
from alignps_jax.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.types import AnyArray

# Fewer results than that are computed as if they were so many: one program for all of them.
_LEAST_RESULTS = 64
_SCENE = [field.name for field in dataclasses.fields(Scene)]
_ORDER = [("taken", "descending"), ("path", "ascending"), ("second", "ascending")]


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleInMemory:
    """N people in S scenes.

    Attributes:
      version: of the tables.
      took: seconds to load.
      scenes: a table of the fields of `Scene`, seconds between frames, and the best score; newest
        first, those of unknown time last.
      content: a number for each scene's content.
      paths: all files of each content that has several.
      scene: each person's row in `scenes`; -1: there is none.
      boxes, scores: of each person.
      embeddings: on the device, with room for more so that few shapes are compiled; None where
        they do not fit into memory.
    """

    version: tuple[int, ...]
    took: float
    scenes: pa.Table
    content: Int[np.ndarray, "S"]
    paths: dict[str, list[str]]
    scene: Int[np.ndarray, "N"]
    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, "N"]
    embeddings: Float[Array, "C D"] | None

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
        k = min(k, len(self))
        most = min(len(among), power_of_two_from(max(k, _LEAST_RESULTS)))
        found = jax.device_get(top_k(padded, self.embeddings, most, among=among))
        results = []
        for index, similarity in zip(found.index, found.similarity[:, :k], strict=True):
            exists = np.isfinite(similarity)
            people = self.people(index[:k][exists])
            results.append(list(zip(people, similarity[exists].tolist(), strict=True)))
        return results[: len(queries)]

    def matching(self, where: Filter) -> Bool[np.ndarray, "N"]:
        """Who passes a filter."""
        # Whoever has no scene (-1) is about to get one, or to go.
        passes = np.append(self._scenes_matching(where), False)[self.scene]
        return passes if where.min_score is None else passes & (self.scores >= where.min_score)

    def _scenes_matching(self, where: Filter) -> Bool[np.ndarray, "S"]:
        """Which scenes pass a filter; by score, where somebody does."""
        condition = where.condition(pc.field, self.paths)
        if condition is None:
            return np.ones(len(self.scenes), bool)
        passes = dataset(self.scenes).to_table(columns={"passes": condition})["passes"]
        matching: Bool[np.ndarray, "S"] = passes.fill_null(False).to_numpy()
        return matching

    def cards(self, where: Filter) -> tuple[Int[np.ndarray, "c"], Int[np.ndarray, "c"]]:
        """For each photo and video that passes a filter its first row and number of rows."""
        rows = np.flatnonzero(self._scenes_matching(where))
        content = self.content[rows]
        first = np.zeros(len(self.content), int)
        first[content[::-1]] = rows[::-1]  # the last one that is written stays
        newest = rows[first[content] == rows]
        return newest, np.bincount(content)[self.content[newest]]

    def people(self, rows: Int[np.ndarray, "k"]) -> list[Person]:
        """The people of some rows."""
        needed, place = np.unique(self.scene[rows], return_inverse=True)
        scenes = self.scenes_of(needed)
        return [
            Person(person_id(scene.id, self.boxes[row]), scene, self.boxes[row], score)
            for row, scene, score in zip(
                rows, (scenes[at] for at in place), self.scores[rows].tolist(), strict=True
            )
        ]

    def people_of(self, scene: str) -> list[Person]:
        """The people of a scene (its id), best score first."""
        place = pc.index(self.scenes["id"], scene).as_py()
        rows = np.flatnonzero((self.scene == place) & (place >= 0))
        return self.people(rows[np.argsort(-self.scores[rows], kind="stable")])

    def person(self, identity: str) -> Person | None:
        """The person of an id."""
        people = self.people_of(identity.partition("-")[0])
        return next((person for person in people if person.id == identity), None)

    def scenes_of(self, rows: Int[np.ndarray, "k"]) -> list[Scene]:
        """The scenes of some rows of `scenes`."""
        return [Scene(**row) for row in self.scenes.select(_SCENE).take(rows).to_pylist()]

    def scenes_with(self, column: str, value: str) -> list[Scene]:
        """The scenes with that value in a column."""
        return self.scenes_of(np.flatnonzero(pc.equal(self.scenes[column], value)))

    def paths_of(self, scene: Scene) -> tuple[str, ...]:
        """All files of a scene, its own path first."""
        return tuple(dict.fromkeys((scene.path, *self.paths.get(scene.hash, ()))))


def load_people(people: People) -> PeopleInMemory:
    """A gallery as it is now."""
    start, version, dim = time.perf_counter(), people.version, people.info.dim
    # In this order, since a scene is committed after its people. What comes meanwhile makes another
    # version, and is read next time.
    paths = _paths(people.files.rows(["path", "hash"]))
    scenes = people.scenes.rows([*_SCENE, "every"]).sort_by(_ORDER)
    with people.table.open() as table:
        count, row, batches = table.count_rows(), 0, []
        embeddings = _room(count, dim) if fits(count, dim) else None
        columns = ["scene", "score", "box", *["embedding"] * (embeddings is not None)]
        reader = table.search().select(columns).to_batches()
        for batch in reader:
            if embeddings is not None:
                some = batch["embedding"].flatten().to_numpy()
                embeddings[row : row + len(batch)] = some.reshape(-1, dim)
            row += len(batch)
            batches.append(batch.select(columns[:3]))
    found = pa.Table.from_batches(batches, pa.schema([reader.schema.field(i) for i in range(3)]))
    owner = pc.index_in(found["scene"], value_set=scenes["id"].combine_chunks()).fill_null(-1)
    owner, scores = owner.to_numpy(), found["score"].to_numpy()
    best = np.full(len(scenes) + 1, -1, np.float32)
    np.maximum.at(best, owner, scores)
    return PeopleInMemory(
        version=version,
        took=time.perf_counter() - start,
        scenes=scenes.append_column("score", pa.array(best[:-1])),
        content=scenes["hash"].combine_chunks().dictionary_encode().indices.to_numpy(),
        paths=paths,
        scene=owner,
        boxes=pc.list_flatten(found["box"]).to_numpy().reshape(-1, 4),
        scores=scores,
        embeddings=None if embeddings is None else jnp.asarray(embeddings),
    )


def fits(people: int, dim: int) -> bool:
    """Whether the embeddings of so many people take at most half of the free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    free = min(free, stats.get("bytes_limit", free) - stats.get("bytes_in_use", 0))
    return _capacity(people) * dim * 4 <= free // 2


def _paths(files: pa.Table) -> dict[str, list[str]]:
    """The files of each content that has several."""
    groups = files.sort_by("path").group_by("hash", use_threads=False)
    found = groups.aggregate([("path", "list")])
    found = found.filter(pc.list_value_length(pc.field("path_list")) > 1)
    return dict(zip(found["hash"].to_pylist(), found["path_list"].to_pylist(), strict=True))


def _capacity(count: int) -> int:
    """Room for so many: an eighth more at most where there are many, in few different sizes."""
    step = max(1024, power_of_two_from(count) // 8)
    return max(CHUNK if count > CHUNK else 1024, -(-count // step) * step)


def _room(count: int, dim: int) -> Float[np.ndarray, "C D"]:
    """Room for embeddings that JAX takes without a copy, as Arrow aligns it."""
    capacity = _capacity(count)
    room = np.frombuffer(pa.allocate_buffer(capacity * dim * 4), np.float32).reshape(capacity, dim)
    room[count:] = 0
    return room
