"""The people of a gallery in LanceDB, and the scenes and files that they were found in.

A file row says that a path with a content (hash) is indexed, a scene row is a photo or a frame, a
person row is somebody in a scene and repeats what is known of it. Scenes and people belong to a
content: copies are further file rows. Whoever has no scene yet does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from lancedb.index import IvfPq

from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.errors import UserError
from alignps_jax.files import complete_file
from alignps_jax.gallery.entries import GalleryInfo, Scene, person_id
from alignps_jax.gallery.tables import Note, Notes, Table, in_one_line
from alignps_jax.types import Detections

_KEY = {"lance-schema:unenforced-primary-key": "true"}


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
    """The people of a gallery, with tables of files, scenes, people and notes of all kinds.

    `address` is a folder such as people.lance, or s3://bucket/people.lance, `info` the detector
    that made it.
    """

    def __init__(self, address: str, info: GalleryInfo | None = None):
        """Opens a gallery, or makes an empty one for `info`; UserError if there is none."""
        place, self.address = Path(address), address
        others = sorted(path.name for path in place.glob("[!.]*") if path.suffix != ".lance")
        if info is not None and others:
            raise UserError(f"--gallery: found {others[0]} in {place}, expected a gallery")
        if info is None and not is_gallery(address):
            raise UserError(f"--gallery: found none in {place}, expected what --mode=index made")
        scene = vars(Scene("", "", 0, 0, datetime.datetime.now(), "", 0.0, "")) | {"every": 0.0}
        examples = {
            "files": FileState("", 0, 0, "")._asdict(),
            "scenes": scene,
            "notes": vars(Note("", ("",), {})) | {"content": "", "kind": ""},
            "people": {"id": "", "scene": ""} | scene,
        }
        vectors = [pa.field("score", pa.float32()), pa.field("box", pa.list_(pa.float32(), 4))]
        vectors += [pa.field("embedding", pa.list_(pa.float32(), info.dim if info else 0))]
        with in_one_line(address):
            database = lancedb.connect(address)
            for name, example in examples.items() if info else ():
                key, *columns = pa.Table.from_pylist([example]).schema
                # Of rows with the same key that several processes add at once, one stays.
                columns = [key.with_nullable(False).with_metadata(_KEY), *columns]
                columns += vectors if name == "people" else []
                with contextlib.suppress(ValueError):  # another detector's, which Gallery says
                    database.create_table(name, schema=pa.schema(columns), exist_ok=True)
        self._tables = [Table(database, name) for name in examples]
        self.files, self.scenes, self.all_notes, self.table = self._tables
        detector = self.notes("detector")
        if info is not None and not detector.all():
            detector.put([Note("detector", (), dataclasses.asdict(info))])
        if not (known := detector.all()):
            raise UserError(f"--gallery: {place} was never filled, expected what --mode=index made")
        scale = tuple(known[0].content["test_scale"])
        self.info = GalleryInfo(**{**known[0].content, "test_scale": scale})

    def notes(self, kind: str) -> Notes:
        """The notes of a kind, such as "marks"."""
        return Notes(self.all_notes, kind)

    @property
    def version(self) -> tuple[int, ...]:
        """Changes with every commit of files, scenes, people."""
        return self.files.version, self.scenes.version, self.table.version

    def known_files(self) -> dict[str, FileState]:
        """All files that are indexed, by path."""
        rows = self.files.rows(FileState._fields).to_pylist()
        return {row["path"]: FileState(**row) for row in rows}

    def commit(self, scenes: Sequence[FoundScene], files: Sequence[FileState]) -> None:
        """Adds scenes and files, in place of what the gallery has of them."""
        rows = [vars(one.scene) | {"every": one.every} for one in scenes]
        people = [
            row
            | {"scene": row["id"], "id": person_id(row["id"], box)}
            | {"box": box, "score": score, "embedding": embedding}
            for row, one in zip(rows, scenes, strict=True)
            for box, score, embedding, _ in zip(*vars(one.people).values(), strict=True)
        ]
        # What a kill leaves in between belongs to a file that is looked at again.
        self.files.put([file._replace(complete=False)._asdict() for file in files])
        self.table.put(people)
        self.scenes.put(rows)
        self.files.put([file._asdict() for file in files])

    def remove_files(self, paths: Collection[str]) -> None:
        """Removes files, and the scenes and people of contents that no other file has."""
        gone = self.files.rows(["hash"], path=paths)["hash"].unique().to_pylist()
        self.files.delete("path", paths)
        self.settle(gone)

    def settle(self, contents: Collection[str]) -> None:
        """Removes contents that no file has, and gives others the path of a file that has them."""
        files = self.files.rows(["hash", "path"], hash=contents).to_pylist()
        paths = {row["hash"]: row["path"] for row in reversed(files)}
        self.remove(set(contents) - paths.keys())
        moved = pa.table([list(paths), list(paths.values())], ["hash", "path"])
        for one in (self.scenes, self.table) if paths else ():
            with one.open() as table:
                table.merge_insert("hash").when_matched_update_all().execute(moved)

    def remove_strays(self) -> None:
        """Removes the scenes and people of no file, which only an interrupted run leaves."""
        known, *found = (
            set(table.rows(["hash"])["hash"].unique().to_pylist())
            for table in (self.files, self.scenes, self.table)
        )
        self.remove(set.union(*found) - known)

    def remove(self, contents: Collection[str], people: Collection[str] = ()) -> None:
        """Removes the scenes and people of contents, and single people (ids); files stay known."""
        self.scenes.delete("hash", contents)
        self.table.delete("hash", contents)
        self.table.delete("id", people)

    def nearest(
        self, query: Float[np.ndarray, "D"], k: int, wanted: Any = None, exact: bool = False
    ) -> list[tuple[str, float]]:
        """Ids and similarities of people, by the vector index if there is one.

        `wanted`: what they must fulfil, as an expression of LanceDB.
        """
        with self.table.open() as table:
            search = table.search(query, vector_column_name="embedding").distance_type("cosine")
            search = search.bypass_vector_index() if exact else search
            # A few lists of every thousand; candidates are compared again exactly.
            search = search.nprobes(max(64, table.count_rows() // 40_000))
            search = search.refine_factor(max(4, min(40, 8000 // k))).limit(k)
            search = search if wanted is None else search.where(wanted, prefilter=True)
            rows = search.select(["id", "_distance"]).to_arrow().to_pylist()
        return [(row["id"], 1.0 - row["_distance"]) for row in rows]

    def train(self) -> None:
        """Makes the vector index anew, and notes how many people it was made of and its recall."""
        dim, shares = self.info.dim, []
        with self.table.open() as table:
            # Codes of a byte for eight values, where their length allows.
            lists = IvfPq(distance_type="cosine", num_sub_vectors=math.gcd(dim, max(1, dim // 8)))
            table.create_index("embedding", config=lists, replace=True)
            count = table.count_rows()
            sample = table.search().select(["embedding"]).offset(count // 2).limit(20)
            queries = np.array(sample.to_arrow()["embedding"].to_pylist(), np.float32)
        for query in queries:
            best = {one for one, _ in self.nearest(query, 11, exact=True)}
            shares.append(len(best.intersection(dict(self.nearest(query, 11)))) / len(best))
        content = {"people": count, "recall": float(np.mean(shares))}
        self.notes("vector_index").put([Note("vector_index", (), content)])

    def trained(self) -> Mapping[str, Any]:
        """What `train` noted; {} without a vector index."""
        return next((note.content for note in self.notes("vector_index").all()), {})

    def optimize(self) -> None:
        """See `Table.optimize`; what stands in its way, such as a purge, is for next time."""
        try:
            for table in self._tables:
                table.optimize()
        except UserError as error:
            print(f"note: {error}")

    def purge(self) -> str | None:
        """See `Table.optimize`; returns why older states remain, where they do."""
        if self.address.startswith("db://"):
            return "this service keeps older states as long as it is set up to"
        self.notes("vector_index").remove(["vector_index"])
        for table in self._tables:
            table.optimize(purge=True)
        return None

    def export(self, target: Path) -> int:
        """Writes everybody to a .parquet file, a row per person; returns their number.

        `box` is x1, y1, x2, y2 in pixels of the scene, `embedding` of length one. Needs memory for
        a few thousand people only.
        """
        if target.suffix.lower() != ".parquet":
            raise UserError(f"--target: found {target}, expected a file .parquet for a gallery")
        with self.table.open() as table, complete_file(target) as temporary:
            batches = table.search().to_batches()
            with pq.ParquetWriter(temporary, batches.schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            return int(table.count_rows())

    def only_writer(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a second indexing process of a gallery on a disk out; UserError if there is one."""
        return contextlib.nullcontext() if "://" in self.address else one_writer(Path(self.address))


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()
