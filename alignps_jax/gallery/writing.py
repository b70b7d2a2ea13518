"""Writing to a gallery: each commit is complete or not there at all, whoever else commits."""

from __future__ import annotations

import dataclasses
import datetime
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from lancedb.index import BTree, IvfPq

from alignps_jax.gallery.database import committing, reading
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import IS_PERSON, IS_SCENE, IndexedScene, one_of, quoted, rows
from alignps_jax.types import UserError

# Old states stay for whoever is reading them.
_KEEP_OLD = datetime.timedelta(hours=1)
# Paths in one condition.
_PATHS = 500
_KNOWN = ("path", "size", "mtime", "every", "final", "second")


@dataclasses.dataclass(frozen=True)
class KnownFile:
    """A file in a gallery: its state, and how far it is indexed.

    Attributes:
      size, mtime: in bytes, and ns since 1970.
      every: seconds between frames; None for photos.
      seconds: the frames of a video that is not complete yet; None: it is complete.
    """

    size: int
    mtime: int
    every: float | None
    seconds: frozenset[float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class KnownFiles(Mapping[str, KnownFile]):
    """Many files by path, as columns.

    With an object for each, Python's garbage collector took most of the time, and a larger share
    the more files there were.

    Attributes:
      rows: the row of each path in `sizes`, `mtimes` and `every`, which is NaN for photos.
      unfinished: the frames of each video that is not complete.
    """

    rows: Mapping[str, int]
    sizes: Int[np.ndarray, "N"]
    mtimes: Int[np.ndarray, "N"]
    every: Float[np.ndarray, "N"]
    unfinished: Mapping[str, frozenset[float]]

    def __getitem__(self, path: str) -> KnownFile:
        row = self.rows[path]
        every = float(self.every[row])
        return KnownFile(
            size=int(self.sizes[row]),
            mtime=int(self.mtimes[row]),
            every=None if math.isnan(every) else every,
            seconds=self.unfinished.get(path),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def commit_scenes(gallery: Gallery, scenes: Sequence[IndexedScene]) -> None:
    """Adds scenes, in place of what the gallery holds of them and of older states of their files.

    Raises:
      UserError: the gallery cannot be written.
    """
    if not scenes:
        return
    content = rows(scenes, gallery.table.schema)
    stale = " OR ".join(f"({condition})" for condition in _replaced(scenes))

    def commit() -> None:
        gallery.table.checkout_latest()
        # What deletes looks at every row of the table: at ten million people that takes 17 s, and
        # of photos that are new there is nothing to delete.
        known = gallery.table.search().where(stale).select(["id"]).limit(1).to_arrow()
        if known.num_rows or merge(delete=False):
            merge(delete=True)

    def merge(delete: bool) -> int:
        """Returns how many rows it found to update."""
        merging = gallery.table.merge_insert("id").when_matched_update_all()
        merging = merging.when_not_matched_insert_all()
        if delete:
            merging = merging.when_not_matched_by_source_delete(stale)
        # Of a scene with nobody the vector is null, which counts as a bad one.
        return merging.execute(content, on_bad_vectors="null").num_updated_rows

    committing(gallery.address, commit)


def _replaced(scenes: Sequence[IndexedScene]) -> Iterator[str]:
    """Conditions for the rows that scenes replace."""
    photos = [one.scene.path for one in scenes if one.scene.second is None]
    if photos:
        yield one_of("path", photos)
    videos: dict[str, list[IndexedScene]] = {}
    for one in scenes:
        if one.scene.second is not None:
            videos.setdefault(one.scene.path, []).append(one)
    for path, frames in videos.items():
        file = frames[0].file
        same = f"size = {file.size} AND mtime = {file.mtime} AND every = {frames[0].every!r}"
        own = one_of("scene", [frame.scene.id for frame in frames])
        yield f"path = {quoted(path)} AND ({own} OR every IS NULL OR NOT ({same}))"


def known_files(gallery: Gallery, paths: Sequence[str] | None = None) -> KnownFiles:
    """The files that the gallery holds: all, or those of `paths`."""
    batches: list[pa.RecordBatch] = []
    with reading(gallery.address):
        gallery.table.checkout_latest()
        for condition in _of_paths(paths):
            query = gallery.table.search().where(condition).select(list(_KNOWN))
            batches.extend(query.to_batches())
    names: list[str] = []
    for batch in batches:
        names.extend(batch.column("path").to_pylist())
    return KnownFiles(
        rows=dict(zip(names, range(len(names)), strict=True)),
        sizes=_column(batches, "size", np.int64),
        mtimes=_column(batches, "mtime", np.int64),
        every=_column(batches, "every", np.float64),
        unfinished=_unfinished(batches),
    )


def _column(batches: Sequence[pa.RecordBatch], name: str, kind: type) -> Any:
    parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)


def _unfinished(batches: Iterable[pa.RecordBatch]) -> dict[str, frozenset[float]]:
    """The seconds of each video that is not complete."""
    seconds: dict[str, set[float]] = {}
    complete: set[str] = set()
    for batch in batches:
        frames = batch.filter(pc.is_valid(batch.column("second")))
        columns = (frames.column(name).to_pylist() for name in ("path", "second", "final"))
        for path, second, final in zip(*columns, strict=True):
            seconds.setdefault(path, set()).add(second)
            if final:
                complete.add(path)
    return {path: frozenset(found) for path, found in seconds.items() if path not in complete}


def _of_paths(paths: Sequence[str] | None) -> list[str]:
    if paths is None:
        return [IS_SCENE]
    return [f"{IS_SCENE} AND {condition}" for condition in _in_parts(paths)]


def _in_parts(paths: Sequence[str]) -> list[str]:
    starts = range(0, len(paths), _PATHS)
    return [one_of("path", paths[start : start + _PATHS]) for start in starts]


def remove_files(gallery: Gallery, paths: Collection[str]) -> None:
    """Removes everything that was found in files.

    Raises:
      UserError: the gallery cannot be written.
    """
    for condition in _in_parts(sorted(paths)):
        remove(gallery, condition)


def remove(gallery: Gallery, condition: str) -> None:
    """Removes the rows that fulfil a condition of the table's language; raises as above."""

    def commit() -> None:
        gallery.table.checkout_latest()
        gallery.table.delete(condition)

    committing(gallery.address, commit)


def tidy(gallery: Gallery, make_indices: bool = True) -> None:
    """Puts many small files together, brings indices up to date, and drops old states.

    Without `make_indices` none is made anew, which may take minutes among many people. Whatever
    stands in its way, such as another process that does the same, is left for next time.
    """

    def commit() -> None:
        gallery.table.checkout_latest()
        if make_indices:
            _index(gallery)
        gallery.table.optimize(cleanup_older_than=_KEEP_OLD)

    try:
        committing(gallery.address, commit)
    except UserError as error:
        print(f"note: {error}")


def _index(gallery: Gallery) -> None:
    """Makes the indices that lookups and, among many people, a search are quick with."""
    table: Any = gallery.table
    indexed = {index.columns[0] for index in table.list_indices()}
    for column in ("id", "scene", "path"):
        if column not in indexed:
            table.create_index(column, config=BTree())
    if "embedding" not in indexed and table.count_rows(IS_PERSON) > gallery.exact_up_to:
        table.create_index("embedding", config=vector_index(gallery.about.dim))


def vector_index(dim: int) -> IvfPq:
    """Embeddings in lists, as codes of a byte for eight values where their length allows."""
    return IvfPq(distance_type="cosine", num_sub_vectors=math.gcd(dim, max(1, dim // 8)))


def purge(gallery: Gallery) -> None:
    """Writes everything anew without what was removed, and deletes every older state.

    A removed row is only marked as such in its file; other files, older states, and indices hold
    it, too. Whoever reads an older state meanwhile gets an error, and so does whoever writes.

    Raises:
      UserError: the gallery cannot be written.
    """
    table: Any = gallery.table

    def commit() -> None:
        table.checkout_latest()
        for index in table.list_indices():
            table.drop_index(index.name)
        table.update(where="true", values_sql={"number": "number"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that all older states go
            table.optimize(cleanup_older_than=datetime.timedelta(0), delete_unverified=True)

    committing(gallery.address, commit)
    tidy(gallery)
