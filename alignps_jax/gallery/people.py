"""The people of a gallery in LanceDB, and the scenes and files that they were found in.

A file row says that a path with a content (hash) is indexed; a scene row is a photo or a frame; a
person row is somebody in a scene and repeats what is known of it. Scenes and people belong to a
content, not to a path: copies are further file rows. People are committed before their scenes, and
these before their files; whoever has no scene does not count: no kill leaves half of a photo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from lancedb.expr import col
from lancedb.index import IvfPq

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter, GalleryInfo, Scene, person_id
from alignps_jax.gallery.tables import NOTES, Note, Notes, Table, columns_of, in_one_line, keyed
from alignps_jax.types import Detections

_INFO = b"alignps_jax"
_SAMPLE = 20  # people by whom the recall is measured


@dataclasses.dataclass(frozen=True)
class FoundScene:
    """A scene, its people (best first), and seconds between frames (0 for photos)."""

    scene: Scene
    people: Detections
    every: float = 0.0


class FileState(NamedTuple):
    """A file as it was indexed; `complete` is False for a video until its last frame is in."""

    path: str
    size: int
    mtime: int
    hash: str
    every: float = 0.0
    complete: bool = True


_FILES = keyed(columns_of(FileState))
_SCENES = keyed(columns_of(Scene) | {"every": pa.float64()})


def schema(info: GalleryInfo) -> pa.Schema:
    """The columns of the table of people, with the detector that made it."""
    found = {"box": pa.list_(pa.float32(), 4), "score": pa.float32()}
    found["embedding"] = pa.list_(pa.float32(), info.dim)
    columns = {"id": pa.string(), "scene": pa.string()} | columns_of(Scene)
    text = json.dumps(dataclasses.asdict(info))
    return keyed(columns | {"every": pa.float64()} | found).with_metadata({_INFO: text.encode()})


class People:
    """The people of a gallery.

    Attributes:
      address: a folder such as people.lance, or s3://bucket/people.lance.
      info: the detector that made it.
      files, scenes, table, all_notes: tables of files, scenes, people, and notes of all kinds.
    """

    def __init__(self, address: str, info: GalleryInfo | None = None):
        """Opens a gallery, or makes an empty one for `info`; UserError if there is none."""
        _check_place(address, making=info is not None)
        self.address = address
        with in_one_line(address):
            database = lancedb.connect(address)
        schemas = {"files": _FILES, "scenes": _SCENES, "notes": NOTES}
        self.files, self.scenes, self.all_notes, self.table = self._tables = [
            Table(database, name, columns if info else None)
            for name, columns in (schemas | {"people": info and schema(info)}).items()
        ]
        with self.table.open() as table:
            self.info = _info(address, table.schema)

    def notes(self, kind: str) -> Notes:
        """The notes of a kind, such as "marks"."""
        return Notes(self.all_notes, kind)

    @property
    def version(self) -> tuple[int, ...]:
        """Changes with every commit of files, scenes, people."""
        return self.files.version, self.scenes.version, self.table.version

    def known_files(self) -> dict[str, FileState]:
        """All files that are indexed, by path."""
        columns = self.files.rows(FileState._fields).columns
        states = map(FileState, *(column.to_pylist() for column in columns))
        return {state.path: state for state in states}

    def last_second(self, content: str) -> float | None:
        """The last frame of a video that is in; None if there is none."""
        found: float | None = pc.max(self.scenes.rows(["second"], hash=[content])["second"]).as_py()
        return found

    def commit(self, scenes: Sequence[FoundScene], files: Sequence[FileState]) -> None:
        """Adds scenes and files, in place of what the gallery has of them."""
        rows = [vars(one.scene) | {"every": one.every} for one in scenes]
        people = [
            row
            | {"scene": row["id"], "id": person_id(row["id"], box)}
            | {"box": box, "score": score, "embedding": embedding}
            for row, people in zip(rows, (one.people for one in scenes), strict=True)
            for box, score, embedding in zip(
                *map(np.asarray, (people.boxes, people.scores, people.embeddings)), strict=True
            )
        ]
        self.table.put(pa.Table.from_pylist(people, schema(self.info)))
        self.scenes.put(pa.Table.from_pylist(rows, _SCENES))
        self.files.put(pa.Table.from_pylist([file._asdict() for file in files], _FILES))

    def remove_files(self, paths: Collection[str]) -> None:
        """Removes files, and the scenes and people of contents that no other file has."""
        gone = self.files.rows(["hash"], path=paths)["hash"].unique().to_pylist()
        same = self.files.rows(["hash", "path"], hash=gone).to_pylist()
        others = {row["hash"]: row["path"] for row in same if row["path"] not in paths}
        for table, columns in ((self.scenes, _SCENES), (self.table, schema(self.info))):
            moved = table.rows(columns.names, hash=others, path=paths).to_pylist()
            moved = [row | {"path": others[row["hash"]]} for row in moved]
            table.put(pa.Table.from_pylist(moved, columns))
        self.remove(set(gone) - others.keys())
        self.files.delete("path", paths)

    def remove(self, contents: Collection[str], people: Collection[str] = ()) -> None:
        """Removes the scenes and people of contents, and single people (ids); files stay known."""
        self.scenes.delete("hash", contents)
        self.table.delete("hash", contents)
        self.table.delete("id", people)

    def remove_strays(self) -> None:
        """Removes the scenes and people without a file that an interrupted run left."""
        known, *found = (
            set(table.rows(["hash"])["hash"].unique().to_pylist())
            for table in (self.files, self.scenes, self.table)
        )
        self.remove(set.union(*found) - known)

    def nearest(
        self,
        query: Float[np.ndarray, "D"],
        k: int,
        where: Filter,
        paths: Mapping[str, Sequence[str]],
        exact: bool = False,
    ) -> list[tuple[str, float]]:
        """Ids and similarities of people, by the vector index if there is one.

        `paths`: the files of each content that has several.
        """
        with self.table.open() as table:
            search = table.search(query, vector_column_name="embedding").distance_type("cosine")
            search = search.bypass_vector_index() if exact else search
            # A few lists of every thousand; candidates are compared again exactly.
            search = search.nprobes(max(64, table.count_rows() // 40_000))
            search = search.refine_factor(max(4, min(40, 8000 // k))).limit(k)
            if (wanted := where.condition(col, paths)) is not None:
                search = search.where(wanted, prefilter=True)
            rows = search.select(["id", "_distance"]).to_arrow().to_pylist()
        return [(row["id"], 1.0 - row["_distance"]) for row in rows]

    def train(self) -> None:
        """Makes the vector index anew, and notes how many people it was made of and its recall."""
        dim = self.info.dim
        with self.table.open() as table:
            # Codes of a byte for eight values, where their length allows.
            lists = IvfPq(distance_type="cosine", num_sub_vectors=math.gcd(dim, max(1, dim // 8)))
            table.create_index("embedding", config=lists, replace=True)
            count = table.count_rows()
            sample = table.search().select(["embedding"]).offset(count // 2).limit(_SAMPLE)
            queries = np.array(sample.to_arrow()["embedding"].to_pylist(), np.float32)
        shares = []
        for query in queries:
            found, best = (
                {one for one, _ in self.nearest(query, 11, Filter(), {}, exact)}
                for exact in (False, True)
            )
            shares.append(len(found & best) / len(best))
        content = {"people": count, "recall": float(np.mean(shares))}
        self.notes("vector_index").put([Note("embedding", (), content)])

    def trained(self) -> Mapping[str, Any]:
        """What `train` noted; {} without a vector index."""
        return next((note.content for note in self.notes("vector_index").all()), {})

    def optimize(self) -> None:
        """Puts small files together, brings indices up to date, and drops older states.

        What stands in its way, such as another process that does the same, is left for next time.
        """
        try:
            for table in self._tables:
                table.optimize()
        except UserError as error:
            print(f"note: {error}")

    def purge(self) -> str | None:
        """See `Table.purge`; returns why older states remain, where they do."""
        if self.address.startswith("db://"):
            return "this service keeps older states as long as it is set up to"
        self.notes("vector_index").remove(["embedding"])
        for table in self._tables:
            table.purge()
        self.optimize()
        return None

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keeps a second indexing process of a gallery on a disk out; UserError if there is one."""
        is_local = "://" not in self.address
        lock = filelock.FileLock(f"{self.address}/.indexing", timeout=0)
        try:
            with lock if is_local else contextlib.nullcontext():
                yield
        except filelock.Timeout as error:
            raise UserError(f"--gallery: {self.address}: another process indexes it") from error


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()


def _check_place(address: str, making: bool) -> None:
    """Raises UserError if a folder holds other things than a gallery, or there is none to open."""
    place = Path(address)
    others = [path.name for path in place.glob("[!.]*") if path.suffix != ".lance"]
    if making and "://" not in address and (others or place.is_file()):
        found = min(others, default="a file")
        raise UserError(f"--gallery: found {found} in {place}, expected a gallery or nothing there")
    if not (making or is_gallery(address)):
        raise UserError(f"--gallery: found no gallery in {place}, expected what --mode=index made")


def _info(address: str, found: pa.Schema) -> GalleryInfo:
    """The detector that made a table; UserError if it is no gallery, or one of another version."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        stored = json.loads((found.metadata or {})[_INFO])
        info = GalleryInfo(**stored | {"test_scale": tuple(stored["test_scale"])})
        if found.equals(schema(info)):
            return info
    raise UserError(f"--gallery: {address} is no gallery of this version; index anew elsewhere")
