"""The people of a gallery in LanceDB, and the scenes and files that they were found in.

A file row says that a path with a content (hash) is indexed, a scene row is a photo or a frame, a
person row is somebody in a scene and repeats what is known of it. Scenes and people belong to a
content, whatever its files are called. People without a scene, or without a file, are ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import operator
import time
import warnings
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from lancedb.expr import col, lit
from lancedb.index import BTree, IvfPq

from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.errors import UserError
from alignps_jax.files import complete_file
from alignps_jax.gallery.entries import Filter, GalleryInfo, Scene, person_id
from alignps_jax.types import Detections

# That others cannot read older states any more is what a purge is for.
warnings.filterwarnings("ignore", r"optimize\(cleanup_older_than=0\)")
_KEY = {"lance-schema:unenforced-primary-key": "true"}
_INDEXED = {"id", "path", "hash", "taken"}


@dataclasses.dataclass(frozen=True)
class FoundScene:
    """A scene and its people, best first."""

    scene: Scene
    people: Detections


class FileState(NamedTuple):
    """A file as indexed, seconds between its frames (photos: 0), whether all of them are stored."""

    path: str
    size: int
    mtime: int
    hash: str
    every: float = 0.0
    complete: bool = True


_PHOTO = {"id": "", "height": 0, "width": 0, "taken": datetime.datetime.min, "camera": ""}
_SCENE = {**_PHOTO, "second": 0.0, "hash": "", "kind": ""}
_MARK = {"id": "", "view": "", "person": "", "right": True, "similarity": 0.0, "name": ""}
# A row of each table; the first column is the key.
_ROWS: dict[str, dict[str, Any]] = {
    "files": FileState("", 0, 0, "")._asdict(),
    "scenes": _SCENE,
    "marks": {**_MARK, "at": 0.0},
    "groups": {"person": "", "id": "", "name": "", "day": "", "by_hand": True, "at": 0.0},
    "forgotten": {"id": "", "path": "", "hash": "", "person": "", "second": 0.0, "box": [0.0]},
    "trained": {"id": "", "people": 0, "recall": 0.0},
    "people": {"id": "", "scene": "", **_SCENE},
}


@contextlib.contextmanager
def _in_one_line(address: str) -> Iterator[None]:
    """Turns any error of LanceDB into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split()).partition(", /")[0][:800]
        raise UserError(f"--gallery: {address}: {reason or type(error).__name__}") from error


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a LanceDB database; its first column is the key."""

    database: Any
    name: str

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """LanceDB's table as it is now: what others commit is not seen in the block."""
        with _in_one_line(self.database.uri):
            yield self.database.open_table(self.name)

    @property
    def version(self) -> Hashable:
        """Changes with every commit, and where a gallery was made anew."""
        with self.open() as table:
            return table.version, table.schema.metadata[b"made"]

    def count(self) -> int:
        """The number of rows."""
        with self.open() as table:
            return int(table.count_rows())

    def rows(self, columns: Collection[str] = (), **values: Collection[str]) -> pa.Table:
        """Columns (default: all) of the rows with one of these values in each of these columns."""
        conditions = (col(name).isin(list(some)) for name, some in values.items())
        wanted = functools.reduce(operator.and_, conditions, lit(True))
        with self.open() as table:
            return table.search().where(wanted).select([*columns] or table.schema.names).to_arrow()

    def put(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, of each key the first one, in place of those with the same keys, at once."""
        if rows:
            with self.open() as table:
                key = table.schema.names[0]
                first = list({row[key]: row for row in reversed(rows)}.values())[::-1]
                # PyArrow casts to lists of one length much faster than it makes them of rows.
                found = pa.Table.from_pylist(first).select(table.schema.names).cast(table.schema)
                merge = table.merge_insert(key).when_matched_update_all()
                merge.when_not_matched_insert_all().execute(found)

    def delete(self, column: str, values: Collection[str]) -> None:
        """Removes the rows with one of these values."""
        if values:
            with self.open() as table:
                table.delete(col(column).isin(list(values)))

    def optimize(self, purge: bool = False) -> None:
        """Tidies, and drops states older than an hour, or (`purge`) all that holds removed rows."""
        with self.open() as table:
            if purge:  # files only mark what is removed: all of them are written anew
                for index in table.list_indices():
                    table.drop_index(index.name)
                table.update(values_sql=dict([table.schema.names[:1] * 2]))
            known = {index.columns[0] for index in table.list_indices()}
            for column in _INDEXED.intersection(table.schema.names) - known:
                table.create_index(column, config=BTree())
            table.optimize(cleanup_older_than=datetime.timedelta(hours=0 if purge else 1))


class People:
    """The people of a gallery: tables of files, scenes, people, and of what is said about them.

    `address` is a folder or URL; `info` is the detector that made the gallery.
    """

    def __init__(self, address: str, info: GalleryInfo | None = None):
        """Opens a gallery, or makes an empty one for `info`; UserError if there is none."""
        place, self.address = Path(address), address
        others = sorted(path.name for path in place.glob("[!.]*") if path.suffix != ".lance")
        if info is not None and others:
            raise UserError(f"--gallery: found {others[0]} in {place}, expected a gallery")
        if info is None and not is_gallery(address):
            raise UserError(f"--gallery: found none in {place}, expected what --mode=index made")
        with _in_one_line(address):
            database = lancedb.connect(address)
            for name, schema in _schemas(info) if info else ():
                with contextlib.suppress(ValueError):  # it is there
                    database.create_table(name, schema=schema)
        self._tables = [Table(database, name) for name in _ROWS]
        self.files, self.scenes, self.marks, self.groups, *rest = self._tables
        self.forgotten, self._trained, self.table = rest
        with self.table.open() as table:
            self.info = GalleryInfo(**json.loads(table.schema.metadata[b"detector"]))

    @property
    def version(self) -> Hashable:
        """Changes with every commit of files, scenes, people, and with their vector index."""
        return tuple(x.version for x in (self.files, self.scenes, self.table, self._trained))

    def known_files(self) -> dict[str, FileState]:
        """All files that are indexed, by path."""
        return {row["path"]: FileState(**row) for row in self.files.rows().to_pylist()}

    def commit(self, scenes: Sequence[FoundScene], files: Sequence[FileState]) -> None:
        """Adds scenes and files, in place of what the gallery has of them."""
        rows = [{**vars(x.scene), "scene": x.scene.id, "kind": x.scene.kind} for x in scenes]
        people = [
            {**row, "id": person_id(row["id"], box), "box": box, "score": score, "embedding": one}
            for row, found in zip(rows, scenes, strict=True)
            for box, score, one, _ in zip(*vars(found.people).values(), strict=True)
        ]
        # What a kill leaves in between belongs to a file that is looked at again.
        self.files.put([file._replace(complete=False)._asdict() for file in files])
        self.table.put(people)
        self.scenes.put(rows)
        self.files.put([file._asdict() for file in files])

    def remove(self, contents: Collection[str], people: Collection[str] = ()) -> None:
        """Removes the scenes and people of contents, and single people (ids); files stay known."""
        self.scenes.delete("hash", contents)
        self.table.delete("hash", contents)
        self.table.delete("id", people)

    def remove_strays(self) -> None:
        """Removes the scenes and people of contents that no file has any more."""
        known, *found = (
            set(table.rows(["hash"])["hash"].unique().to_pylist())
            for table in (self.files, self.scenes, self.table)
        )
        self.remove(set.union(*found) - known)

    def nearest(
        self,
        query: Float[np.ndarray, "D"],
        k: int,
        where: Filter | None = None,
        contents: Collection[str] = (),
        exact: bool = False,
    ) -> dict[str, float]:
        """Ids and similarities, best first; `contents`: hashes of files in the filter's folder."""
        with self.table.open() as table:
            search = table.search(query, vector_column_name="embedding").distance_type("cosine")
            search = search.bypass_vector_index() if exact else search
            # A few lists of every thousand; candidates are compared again exactly.
            search = search.nprobes(max(64, table.count_rows() // 40_000))
            search = search.refine_factor(max(4, min(40, 8000 // k))).limit(k)
            if where not in (None, Filter()):
                search = search.where(where.condition(col, contents), prefilter=True)
            rows = search.select(["id", "_distance"]).to_arrow().to_pylist()
        return {row["id"]: 1.0 - row["_distance"] for row in rows}

    def train(self) -> None:
        """Makes the vector index anew, and notes how many people it was made of and its recall."""
        dim = self.info.dim
        with self.table.open() as table:
            # Codes of a byte for eight values, where their length allows.
            lists = IvfPq(distance_type="cosine", num_sub_vectors=math.gcd(dim, max(1, dim // 8)))
            table.create_index("embedding", config=lists, replace=True)
            count = table.count_rows()
            sample = table.search().select(["embedding"]).offset(count // 2).limit(20)
            queries = np.array(sample.to_arrow()["embedding"].to_pylist(), np.float32)
        best = [self.nearest(query, 11, exact=True).keys() for query in queries]
        found = [self.nearest(query, 11).keys() for query in queries]
        recall = np.mean([len(a & b) / len(a) for a, b in zip(best, found, strict=True)])
        self._trained.put([{"id": "", "people": count, "recall": float(recall)}])

    def trained(self) -> Mapping[str, Any]:
        """Of how many `people` the vector index was made, and its `recall`; {} without one."""
        return next(iter(self._trained.rows().to_pylist()), {})

    def optimize(self) -> None:
        """See `Table.optimize`; what stands in its way, such as a purge, is for next time."""
        with contextlib.suppress(UserError):
            for table in self._tables:
                table.optimize()

    def purge(self) -> str | None:
        """See `Table.optimize`; returns why older states remain, where they do."""
        if self.address.startswith("db://"):
            return "this service keeps older states as long as it is set up to"
        self._trained.delete("id", [""])
        for table in self._tables:
            table.optimize(purge=True)
        return None

    def export(self, target: Path) -> int:
        """Writes everybody to a .parquet file, a row per person; returns their number.

        `box` is x1, y1, x2, y2 in pixels, `embedding` of length one, `paths` are all copies' files.
        """
        if target.suffix.lower() != ".parquet":
            raise UserError(f"--target: found {target}, expected a file .parquet for a gallery")
        paths = defaultdict[str, list[str]](list)
        for row in self.files.rows(["hash", "path"]).sort_by("path").to_pylist():
            paths[row["hash"]].append(row["path"])
        with self.table.open() as table, complete_file(target) as temporary:
            batches = table.search().to_batches()
            schema = batches.schema.append(pa.field("paths", pa.list_(pa.string())))
            with pq.ParquetWriter(temporary, schema) as writer:
                for batch in batches:
                    found = pa.array(map(paths.get, batch["hash"].to_pylist()), schema.types[-1])
                    writer.write_batch(batch.append_column("paths", found))
            return int(table.count_rows())

    def only_writer(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a second indexing process of a gallery on a disk out; UserError if there is one."""
        return contextlib.nullcontext() if "://" in self.address else one_writer(Path(self.address))


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()


def _schemas(info: GalleryInfo) -> Iterator[tuple[str, pa.Schema]]:
    """The columns of each table; of rows with the same key that are added at once, one stays."""
    about = {"detector": json.dumps(vars(info)), "made": str(time.time())}
    for name, row in _ROWS.items():
        key, *columns = pa.Table.from_pylist([row]).schema
        if name == "people":
            columns += [pa.field("score", pa.float32()), pa.field("box", pa.list_(pa.float32(), 4))]
            columns.append(pa.field("embedding", pa.list_(pa.float32(), info.dim)))
        yield name, pa.schema([key.with_nullable(False).with_metadata(_KEY), *columns], about)
