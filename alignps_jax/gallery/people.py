"""The people of a gallery in LanceDB, and the scenes and files that they were found in.

A file row says that a path with a content (hash) is indexed; a scene row is a photo or a frame; a
person row is somebody in a scene and repeats what is known of it. Scenes and people belong to a
content, not to a path: copies are further file rows. People are committed before their scenes, and
whoever has no scene does not count: no kill leaves half of the people of a photo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from lancedb.expr import col, lit
from lancedb.index import IvfPq

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter, GalleryInfo, Scene, content_hash, person_id
from alignps_jax.gallery.tables import ID, Note, Notes, Table, in_one_line
from alignps_jax.types import Detections

FILE, SCENE = "file", "scene"
SCENE_COLUMNS = ("scene", "path", "height", "width", "taken", "camera", "second", "hash")

_INFO = b"alignps_jax"
_INDICES = ["id", "path", "hash"]
_SAMPLE = 20  # people by whom the recall is measured
_PLACE = {
    **{"scene": pa.string(), "path": pa.string(), "hash": pa.string(), "height": pa.int32()},
    **{"width": pa.int32(), "taken": pa.timestamp("us"), "camera": pa.string()},
    **{"second": pa.float64(), "every": pa.float64()},
}
_FILE = {"kind": pa.string(), "size": pa.int64(), "mtime": pa.int64(), "complete": pa.bool_()}
_SCENES = pa.schema([ID, *(_PLACE | _FILE).items()])


def schema(info: GalleryInfo) -> pa.Schema:
    """The columns of the table of people, with the detector that made it."""
    vectors = {"box": pa.list_(pa.float32(), 4), "embedding": pa.list_(pa.float32(), info.dim)}
    about = {_INFO: json.dumps(dataclasses.asdict(info)).encode()}
    return pa.schema([ID, *(_PLACE | vectors).items(), ("score", pa.float32())], metadata=about)


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


class People:
    """The people of a gallery; an empty one is made for `info`.

    `address` is a folder such as people.lance, or s3://bucket/people.lance, `info` the detector
    that made it, `table` has the people, `scenes` the scenes and files. On a disk, pictures of the
    people may be kept in the folder `thumbnails`, which `forget` removes. UserError if it is none.
    """

    def __init__(self, address: str, info: GalleryInfo | None = None):
        _check_place(address, making=info is not None)
        self.address, always = address, datetime.timedelta(0)
        self.folder = None if "://" in address else Path(address)
        self.thumbnails = self.folder and self.folder / ".thumbnails"
        with in_one_line(address):
            database = lancedb.connect(address, read_consistency_interval=always)
        schemas = {"notes": Notes.SCHEMA, "scenes": _SCENES, "people": info and schema(info)}
        tables = [Table(database, name, one if info else None) for name, one in schemas.items()]
        self._notes, self.scenes, self.table = tables
        for one in tables:
            with one.open() as table:
                columns = table.schema
        self.info = _info(address, columns)

    def notes(self, kind: str) -> Notes:
        """The notes of a kind, such as "marks"."""
        return Notes(self._notes, kind)

    def forget_notes(self, people: set[str]) -> None:
        """Removes all notes about people (ids)."""
        rows = self._notes.rows(["id", "people"]).to_pylist()
        self._notes.delete(id=[row["id"] for row in rows if not people.isdisjoint(row["people"])])

    def known_files(self) -> dict[str, FileState]:
        """All files that are indexed, by path."""
        columns = self.scenes.rows(FileState._fields, kind=FILE).columns
        states = map(FileState, *(column.to_pylist() for column in columns))
        return {state.path: state for state in states}

    def last_second(self, content: str) -> float | None:
        """The last frame of a video that is in; None if there is none."""
        seconds = self.scenes.rows(["second"], kind=SCENE, hash=content)["second"]
        found: float | None = pc.max(seconds).as_py()
        return found

    @property
    def version(self) -> tuple[int, int]:
        """Changes with every commit."""
        return self.scenes.version, self.table.version

    def commit(self, scenes: Sequence[FoundScene], files: Sequence[FileState]) -> None:
        """Adds scenes and files, in place of what the gallery has of them."""
        if any(len(found.people.scores) for found in scenes):
            self.table.put(_people_rows(scenes, schema(self.info)))
        rows = [
            vars(found.scene) | {"kind": SCENE, "every": found.every, "scene": found.scene.id}
            for found in scenes
        ]
        for file in files:
            identity = content_hash(file.path.encode())
            rows.append(file._asdict() | {"kind": FILE, "id": identity, "scene": ""})
        if rows:
            self.scenes.put(pa.Table.from_pylist(rows, _SCENES))

    def remove_files(self, paths: Collection[str]) -> None:
        """Removes files, and the scenes and people of contents that no other file has."""
        everything = sorted(paths)
        for some in (everything[at : at + 500] for at in range(0, len(everything), 500)):
            gone = self.scenes.rows(["hash"], kind=FILE, path=some)["hash"].unique().to_pylist()
            self.scenes.delete(kind=FILE, path=some)
            self.settle(gone)

    def settle(self, contents: Collection[str]) -> None:
        """Removes contents that no file has, and gives others the path of a file that has them."""
        files = self.scenes.rows(["hash", "path"], kind=FILE, hash=list(contents)).to_pylist()
        paths = defaultdict(list)
        for file in files:
            paths[file["hash"]].append(file["path"])
        self.remove(set(contents) - paths.keys())
        for table, kind in ((self.scenes, {"kind": SCENE}), (self.table, {})):
            rows = table.rows(table.columns, hash=list(paths), **kind)
            found = list(zip(rows["hash"].to_pylist(), rows["path"].to_pylist(), strict=True))
            lost = [path not in paths[content] for content, path in found]
            if any(lost):
                moved = pa.array([paths[content][0] for content, _ in found])
                rows = rows.set_column(table.columns.index("path"), "path", moved)
                table.put(rows.filter(pa.array(lost)))

    def remove_strays(self) -> None:
        """Removes what an interrupted run leaves: people without a scene, scenes without a file."""
        files, scenes = (
            self.scenes.rows(["hash", "scene"], kind=kind).combine_chunks()
            for kind in (FILE, SCENE)
        )
        self.remove(set(scenes["hash"].to_pylist()) - set(files["hash"].to_pylist()))
        people = (batch.column("scene").unique() for batch in self.table.batches(["scene"]))
        strays = {scene for some in people for scene in some.to_pylist()}
        self.table.delete(scene=list(strays - set(scenes["scene"].to_pylist())))

    def remove(self, contents: Collection[str], people: Collection[str] = ()) -> None:
        """Removes the scenes and people of contents, and single people (ids); files stay known."""
        self.scenes.delete(kind=SCENE, hash=list(contents))
        self.table.delete(hash=list(contents))
        self.table.delete(id=list(people))

    def nearest(
        self,
        query: Float[np.ndarray, "D"],
        k: int,
        where: Filter,
        copied: Sequence[str] = (),
        exact: bool = False,
    ) -> list[tuple[str, float]]:
        """Ids and similarities of people, by the vector index if there is one."""
        wanted = where.condition(col, copied)
        if where.min_score is not None:
            wanted.append(col("score") >= lit(where.min_score).cast("float32"))
        with self.table.open() as table:
            search = table.search(query, vector_column_name="embedding").distance_type("cosine")
            search = search.bypass_vector_index() if exact else search
            # A few lists of every thousand; candidates are compared again exactly.
            search = search.nprobes(max(64, table.count_rows() // 40_000))
            search = search.refine_factor(max(4, min(40, 8000 // k))).limit(k)
            if wanted:
                search = search.where(functools.reduce(operator.and_, wanted), prefilter=True)
            rows = search.select(["id", "_distance"]).to_arrow().to_pylist()
        return [(row["id"], 1.0 - row["_distance"]) for row in rows]

    def train(self) -> None:
        """Makes the vector index anew, and notes how many people it was made of and its recall."""
        count, dim = self.table.count(), self.info.dim
        with self.table.open() as table:
            # Codes of a byte for eight values, where their length allows.
            lists = IvfPq(distance_type="cosine", num_sub_vectors=math.gcd(dim, max(1, dim // 8)))
            table.create_index("embedding", config=lists, replace=True)
            sample = table.search().offset(count // 2).limit(_SAMPLE)
            queries = sample.select(["embedding"]).to_arrow()["embedding"].to_pylist()
        shares = []
        for query in np.array(queries, np.float32):
            found, best = (
                {one for one, _ in self.nearest(query, 11, Filter(), exact=exact)}
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
            self.scenes.optimize(_INDICES)
            self.table.optimize(_INDICES)
            self._notes.optimize([])
        except UserError as error:
            print(f"note: {error}")

    def purge(self) -> str | None:
        """See `Table.purge`; returns why older states remain, where they do."""
        if self.address.startswith("db://"):
            return "this service keeps older states as long as it is set up to"
        with contextlib.ExitStack() as stack:
            alone = self.folder is not None
            try:
                stack.enter_context(self.only_writer())
            except UserError:
                alone = False
            self.scenes.purge(alone)
            self.table.purge(alone)
            self._notes.purge(alone=False)  # servers may write
        self.optimize()
        return None

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keeps a second indexing process of a gallery on a disk out; UserError if there is one."""
        if self.folder is None:
            yield
            return
        try:
            lock = filelock.FileLock(self.folder / ".indexing").acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"--gallery: {self.address}: another process indexes it") from error
        with lock:
            yield


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()


def _check_place(address: str, making: bool) -> None:
    """Raises UserError if a folder holds other things than a gallery, or there is none to open."""
    if "://" in address:
        return
    place = Path(address)
    names = [path.name for path in place.iterdir()] if place.is_dir() else []
    others = [name for name in names if not name.endswith(".lance") and name[0] != "."]
    if place.is_file() or (making and others):
        found = sorted(others)[0] if others else "a file"
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


def _people_rows(scenes: Sequence[FoundScene], columns: pa.Schema) -> pa.Table:
    """A row per person."""
    owner = pa.array(np.repeat(np.arange(len(scenes)), [len(one.people.scores) for one in scenes]))

    def values(name: str, width: int) -> pa.Array:
        parts = [np.asarray(getattr(one.people, name), np.float32) for one in scenes]
        flat = np.concatenate([part.ravel() for part in parts])
        return pa.FixedSizeListArray.from_arrays(flat, width) if width > 1 else pa.array(flat)

    arrays = {
        name: pa.array([getattr(one.scene, name) for one in scenes], kind).take(owner)
        for name, kind in _PLACE.items()
        if name not in ("scene", "every")
    }
    arrays["every"] = pa.array([one.every for one in scenes]).take(owner)
    arrays["scene"] = pa.array([one.scene.id for one in scenes]).take(owner)
    ids = [person_id(one.scene.id, box) for one in scenes for box in np.asarray(one.people.boxes)]
    arrays |= {"id": pa.array(ids), "score": values("scores", 1), "box": values("boxes", 4)}
    arrays["embedding"] = values("embeddings", columns.field("embedding").type.list_size)
    return pa.table([arrays[name] for name in columns.names], schema=columns)


def scene_of(row: Mapping[str, Any]) -> Scene:
    """The scene of a row (a dictionary with `SCENE_COLUMNS`)."""
    return Scene(row["scene"], *(row[name] for name in SCENE_COLUMNS[1:]))
