"""The people of a gallery in memory, for exact search."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.gallery.entries import Filter, Match, Person, folder_range, person_id
from alignps_jax.gallery.nearest import CHUNK, power_of_two_from, top_k
from alignps_jax.gallery.table import SCENE_COLUMNS, are_embeddings, scene_of
from alignps_jax.types import AnyArray

COLUMNS = (*SCENE_COLUMNS, "number", "box", "score", "embedding")
# Fewer results than that are computed as if they were so many: one program for all of them.
_LEAST_RESULTS = 64
_ALIGNMENT = 64  # bytes, with which JAX takes an array on a CPU as it is


@dataclasses.dataclass(frozen=True)
class PeopleInMemory:
    """N people, with room for more so that few shapes are compiled.

    Attributes:
      version: of the table.
      took: seconds to load.
      embeddings: on the device; rows from N on are zero.
      scene, number: of each person; `scene` is a row of `scenes`.
      boxes, scores: of each person.
      scenes: a table with `SCENE_COLUMNS`.
    """

    version: int
    took: float
    embeddings: Float[Array, "C D"]
    scene: Int[np.ndarray, "N"]
    number: Int[np.ndarray, "N"]
    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, "N"]
    scenes: pa.Table

    def __len__(self) -> int:
        return len(self.scores)

    def search(
        self, queries: Float[AnyArray, "Q D"], k: int, where: Filter, offset: int
    ) -> list[list[Match]]:
        """For each query the results `offset` to `offset + k`, most similar first."""
        wanted = min(len(self), k + offset)
        if wanted <= offset or len(queries) == 0:
            return [[] for _ in queries]
        rows = power_of_two_from(len(queries))
        padded = np.pad(np.asarray(queries, np.float32), ((0, rows - len(queries)), (0, 0)))
        among = np.zeros(len(self.embeddings), bool)
        among[: len(self)] = self.matching(where)
        found = jax.device_get(
            top_k(
                padded,
                self.embeddings,
                min(len(among), power_of_two_from(max(wanted, _LEAST_RESULTS))),
                among=among,
            )
        )
        results = []
        for index, similarity in zip(
            found.index[: len(queries), offset:wanted],
            found.similarity[: len(queries), offset:wanted],
            strict=True,
        ):
            exists = np.isfinite(similarity)
            people = self.people(index[exists])
            results.append(list(map(Match, people, similarity[exists].tolist())))
        return results

    def matching(self, where: Filter) -> Bool[np.ndarray, "N"]:
        """Who passes a filter."""
        conditions = _scene_conditions(self.scenes, where)
        matching = np.ones(len(self), bool)
        if conditions:
            scenes = np.ones(len(self.scenes), bool)
            for condition in conditions:
                scenes &= condition.fill_null(False).to_numpy(zero_copy_only=False)
            matching = scenes[self.scene]
        if where.min_score is not None:
            matching &= self.scores >= np.float32(where.min_score)
        return matching

    def people(self, rows: Int[np.ndarray, "k"]) -> list[Person]:
        """The people of some rows."""
        needed, place = np.unique(self.scene[rows], return_inverse=True)
        scenes = [scene_of(row) for row in self.scenes.take(needed).to_pylist()]
        return [
            Person(
                id=person_id(scenes[at].id, int(self.number[row])),
                scene=scenes[at],
                box=self.boxes[row],
                score=float(self.scores[row]),
            )
            for row, at in zip(rows.tolist(), place.tolist(), strict=True)
        ]


def _scene_conditions(scenes: pa.Table, where: Filter) -> list[Any]:
    """For each condition of a filter on scenes, which of them fulfil it."""
    found: list[Any] = []
    if where.folder is not None:
        low, high = folder_range(where.folder)
        path = scenes["path"]
        found.append(pc.and_(pc.greater_equal(path, low), pc.less(path, high)))
    if where.cameras:
        found.append(pc.is_in(scenes["camera"], pa.array(where.cameras)))
    for bound, compare in ((where.after, pc.greater_equal), (where.before, pc.less_equal)):
        if bound is not None:
            limit = pa.scalar(bound.replace(tzinfo=None), pa.timestamp("us"))
            found.append(compare(scenes["taken"], limit))
    if where.videos is not None:
        found.append(pc.equal(pc.is_valid(scenes["second"]), where.videos))
    return found


def load_people(
    batches: Iterable[pa.RecordBatch], count: int, dim: int, version: int
) -> PeopleInMemory:
    """Takes `count` people from the table.

    Args:
      batches: with `COLUMNS`, as the table gives them.
      count: how many people they hold.
      dim: length of an embedding.
      version: of the table.

    Raises:
      ValueError: an embedding or a box is none, as in a damaged gallery.
    """
    start = time.perf_counter()
    embeddings = _aligned((capacity(count), dim))
    boxes, parts, row = np.empty((count, 4), np.float32), [], 0
    for batch in batches:
        rows = slice(row, row + len(batch))
        for name, into in (("embedding", embeddings), ("box", boxes)):
            into[rows] = _matrix(batch.column(name))
        if not (are_embeddings(embeddings[rows]) and np.isfinite(boxes[rows]).all()):
            raise ValueError("embeddings or boxes are damaged")
        parts.append(batch.select([*SCENE_COLUMNS, "number", "score"]))
        row += len(batch)
    people = pa.Table.from_batches(parts) if parts else _nobody()
    ids = people["scene"].combine_chunks().dictionary_encode()
    scene = ids.indices.to_numpy(zero_copy_only=False).astype(np.int32)
    first = np.unique(scene, return_index=True)[1]
    return PeopleInMemory(
        version=version,
        took=time.perf_counter() - start,
        embeddings=jnp.asarray(embeddings),
        scene=scene,
        number=people["number"].to_numpy().astype(np.int32),
        boxes=boxes,
        scores=people["score"].to_numpy().astype(np.float32),
        scenes=people.select(SCENE_COLUMNS).take(pa.array(first)).combine_chunks(),
    )


def capacity(count: int) -> int:
    """Room for so many: an eighth more at most where there are many, in few different sizes."""
    step = max(1024, power_of_two_from(count) // 8)
    return max(CHUNK if count > CHUNK else 1024, -(-count // step) * step)


def _nobody() -> pa.Table:
    kinds = [
        *(pa.string(), pa.string(), pa.int32(), pa.int32(), pa.timestamp("us"), pa.string()),
        *(pa.float64(), pa.int32(), pa.float32()),
    ]
    return pa.table(
        {
            name: pa.array([], kind)
            for name, kind in zip((*SCENE_COLUMNS, "number", "score"), kinds, strict=True)
        }
    )


def _matrix(column: pa.FixedSizeListArray) -> Float[np.ndarray, "N D"]:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _aligned(shape: tuple[int, int]) -> Float[np.ndarray, "C D"]:
    """Zeros that JAX takes without a copy."""
    size = shape[0] * shape[1] * 4
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
