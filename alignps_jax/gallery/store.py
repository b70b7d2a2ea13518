"""A gallery: everybody who was found in photos and videos, in a LanceDB table that lasts."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from lancedb.query import ColumnOrdering

from alignps_jax.gallery.database import about_detector, about_of, connect, create_people, reading
from alignps_jax.gallery.entries import FileState, Filter, Match, Person, Scene, folder_of
from alignps_jax.gallery.memory import COLUMNS, PeopleInMemory, load_people
from alignps_jax.gallery.query import Corners, find_queries, is_gallery
from alignps_jax.gallery.reading import scene_pixels
from alignps_jax.gallery.table import (
    IS_PERSON,
    IS_SCENE,
    PEOPLE,
    PERSON_COLUMNS,
    SCENE_COLUMNS,
    embedding_of,
    one_of,
    person_of,
    quoted,
    scene_of,
    where_sql,
)
from alignps_jax.inference.detector import Detector
from alignps_jax.types import AnyArray, UserError

EXACT_UP_TO = 2_000_000
# A gallery of more people that grows is read anew after so many times what reading it took.
_QUICKLY_READ, _PATIENCE = 50_000, 20.0
# Lists of the index that are looked at, and candidates per result that are compared exactly.
# The lists grow in number with the gallery, so more are looked at in a large one.
_PROBES, _REFINE = 64, 40
_PEOPLE_PER_PROBE = 40_000

Row = TypeVar("Row")


class Gallery:
    """The people of a gallery, to be searched and looked up; always the newest state.

    Attributes:
      address: where it lies.
      about: what made it.
      exact_up_to: up to so many people, embeddings are kept in memory and a search is exact.
        Beyond, it is LanceDB's, by its vector index if there is one.
    """

    def __init__(
        self,
        address: str,
        table: Any,
        database: Any,
        exact_up_to: int,
        detector: Detector | None = None,
    ):
        self.address = address
        self._detector = detector
        self.exact_up_to = exact_up_to
        self.table, self.database = table, database
        self.about = about_of(address, table)
        self._memory: PeopleInMemory | None = None
        self._loaded = 0.0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        address: str | os.PathLike[str],
        *,
        create_for: Detector | None = None,
        exact_up_to: int = EXACT_UP_TO,
    ) -> Self:
        """Opens the gallery at a folder, or any other address that LanceDB takes.

        Args:
          address: a folder such as people.lance, or s3://bucket/people.lance.
          create_for: the detector to make an empty gallery for where there is none.
          exact_up_to: see the attribute.

        Raises:
          UserError: there is no gallery, it cannot be opened, or another detector than
            `create_for` made it.
        """
        address = os.fspath(address)
        if create_for is None and not is_gallery(address):
            raise UserError(
                f"--gallery: found no gallery in {address}, expected one that --mode=index made"
            )
        database = connect(address)
        if create_for is not None:
            table = create_people(address, database, about_detector(create_for))
        else:
            with reading(address):
                table = database.open_table(PEOPLE)
        gallery = cls(address, table, database, exact_up_to, create_for)
        if create_for is not None:
            gallery.check_detector(create_for)
        return gallery

    def check_detector(self, detector: Detector) -> None:
        """Raises UserError unless this detector's embeddings can be compared with the gallery's."""
        found = about_detector(detector)
        if found.deciding != self.about.deciding:
            raise UserError(
                f"--gallery: {self.address} was made by {self.about}; found {found}; expected the "
                "same, or another gallery"
            )

    @property
    def num_people(self) -> int:
        """How many people there are."""
        return self._count(IS_PERSON)

    @property
    def num_scenes(self) -> int:
        """How many photos and frames there are, those with nobody included."""
        return self._count(IS_SCENE)

    def search(
        self,
        embeddings: Float[AnyArray, "*Q D"],
        k: int,
        where: Filter | None = None,
        offset: int = 0,
    ) -> Any:
        """The people that are most similar to an embedding, or to each of several.

        Args:
          embeddings: of length one, [D] or [Q, D].
          k: how many results, at most.
          where: whom to search; default: everybody.
          offset: results to leave out, best first.

        Returns:
          A list of `Match`, best first; for several embeddings a list of lists.

        Raises:
          UserError: the embeddings are not of this gallery's length, or k or offset is wrong.
        """
        queries = np.asarray(embeddings, np.float32)
        shape = queries.shape
        if queries.ndim not in (1, 2) or shape[-1] != self.about.dim or k < 1 or offset < 0:
            raise UserError(
                f"gallery search: found embeddings of shape {shape}, k = {k}, offset = {offset}, "
                f"expected (queries, {self.about.dim}), k from 1 and offset from 0"
            )
        where = where or Filter()
        memory = self.memory()
        if memory is not None:
            found = memory.search(np.atleast_2d(queries), k, where, offset)
        else:
            found = [self._search_table(one, k, where, offset) for one in np.atleast_2d(queries)]
        return found[0] if queries.ndim == 1 else found

    def add(self, paths: Iterable[str | os.PathLike[str]], every: float = 1.0) -> dict[str, str]:
        """Finds everybody in photos, videos, and folders of them, unless they are known already.

        Needs a gallery that was opened with `create_for`.

        Args:
          paths: what to index.
          every: seconds between the frames of a video that are looked at.

        Returns:
          The files that could not be read, with reasons.

        Raises:
          UserError: a path does not exist, or the gallery cannot be written.
        """
        from alignps_jax.gallery.indexing import index

        sources = [os.fspath(path) for path in paths]
        return index(self, self._own_detector(), sources, every).skipped

    def search_photo(
        self,
        photo: UInt8[np.ndarray, "H W 3"],
        box: Corners,
        k: int,
        where: Filter | None = None,
        offset: int = 0,
    ) -> list[Match]:
        """`search` for the person of an RGB photo that overlaps a box (x1, y1, x2, y2) most.

        Needs a gallery that was opened with `create_for`.

        Raises:
          UserError: nobody is found there.
        """
        found = self._own_detector().detect(photo)
        (query,) = find_queries(
            found, box, self.about.score_threshold, Path("the photo"), photo.shape[:2]
        )
        matches: list[Match] = self.search(query.embedding, k, where, offset)
        return matches

    def _own_detector(self) -> Detector:
        if self._detector is None:
            raise UserError(
                f"{self.address}: was opened without a detector; expected "
                "Gallery.open(..., create_for=detector)"
            )
        return self._detector

    def memory(self) -> PeopleInMemory | None:
        """The people in memory, read anew where they have changed; None if they are too many."""
        with self._lock:
            table = self._latest()
            if self._memory is not None and self._is_good_enough(self._memory):
                return self._memory
            count = self._count(IS_PERSON)
            if count > self.exact_up_to:
                self._memory = None
                return None
            with reading(self.address):
                batches = table.search().where(IS_PERSON).select(list(COLUMNS)).to_batches()
                self._memory = load_people(batches, count, self.about.dim, table.version)
            self._loaded = time.monotonic()
            return self._memory

    def _is_good_enough(self, memory: PeopleInMemory) -> bool:
        """Whether it is the table's newest state, or one that need not be read anew just yet."""
        if memory.version == self.table.version:
            return True
        if len(memory) < _QUICKLY_READ:
            return False
        # Somebody was forgotten since, and older states were deleted.
        if all(memory.version != state["version"] for state in self.table.list_versions()):
            return False
        return time.monotonic() - self._loaded < _PATIENCE * memory.took

    def _search_table(
        self, query: Float[np.ndarray, "D"], k: int, where: Filter, offset: int
    ) -> list[Match]:
        table = self._latest()
        with reading(self.address):
            probes = max(_PROBES, table.count_rows() // _PEOPLE_PER_PROBE)
            search = table.search(query, vector_column_name="embedding")
            search = search.distance_type("cosine").nprobes(probes).refine_factor(_REFINE)
            search = search.where(where_sql(where, IS_PERSON), prefilter=True).limit(k + offset)
            found = search.select([*PERSON_COLUMNS, "embedding", "_distance"]).to_arrow()
            rows = found.slice(offset).to_pylist()
            dict(map(embedding_of, rows))
            return [Match(person_of(row), 1.0 - float(row["_distance"])) for row in rows]

    def scene(self, identity: str) -> Scene | None:
        """The scene of an id."""
        condition = f"scene = {quoted(identity)} AND {IS_SCENE}"
        return next(iter(self._rows(condition, SCENE_COLUMNS, scene_of)), None)

    def people(self, scene: str) -> list[Person]:
        """The people of a scene (its id), best score first."""
        condition = f"scene = {quoted(scene)} AND {IS_PERSON}"
        found = self._rows(condition, PERSON_COLUMNS, person_of)
        return sorted(found, key=lambda person: -person.score)

    def person(self, identity: str) -> Person | None:
        """The person of an id."""
        condition = f"id = {quoted(identity)} AND {IS_PERSON}"
        return next(iter(self._rows(condition, PERSON_COLUMNS, person_of)), None)

    def embeddings(self, people: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The embeddings of people (their ids), in that order.

        Raises:
          UserError: somebody is not in the gallery.
        """
        condition = f"{one_of('id', people)} AND {IS_PERSON}" if people else "false"
        found = dict(self._rows(condition, ("id", "embedding"), embedding_of))
        missing = [identity for identity in people if identity not in found]
        if missing:
            raise UserError(
                f"{self.address}: found nobody with the id {missing[0]!r}, expected one that a "
                "search gave"
            )
        rows = [found[identity] for identity in people]
        return np.array(rows, np.float32).reshape(-1, self.about.dim)

    def scenes(self, limit: int, offset: int = 0, where: Filter | None = None) -> list[Scene]:
        """Some of the scenes, by time (unknown ones last), then path, then second."""
        # A score is a person's, and there are scenes with nobody.
        where = dataclasses.replace(where or Filter(), min_score=None)
        order = [
            ColumnOrdering(column_name=name, ascending=True, nulls_first=False)
            for name in ("taken", "path", "second")
        ]
        with reading(self.address):
            query = self._latest().search().where(where_sql(where, IS_SCENE)).order_by(order)
            found = query.select(list(SCENE_COLUMNS)).limit(limit).offset(offset).to_arrow()
            return [scene_of(row) for row in found.to_pylist()]

    def cameras(self) -> list[str]:
        """The names of all known cameras, sorted."""
        return sorted(filter(None, self._unique("camera")))

    def folders(self) -> list[str]:
        """The folders that scenes lie in, sorted."""
        return sorted({folder_of(path) for path in self._unique("path")})

    def pixels(self, scene: Scene) -> UInt8[np.ndarray, "H W 3"]:
        """The photo, or the frame of the video, RGB.

        Raises:
          UserError: it is gone, cannot be decoded, or is not the one that was indexed.
        """
        condition = f"scene = {quoted(scene.id)} AND {IS_SCENE}"
        files = self._rows(condition, ("size", "mtime", "hash"), lambda row: FileState(**row))
        if not files:
            raise UserError(f"{scene.path}: is not in the gallery {self.address} any more")
        return scene_pixels(scene, files[0], self.about.max_pixels)

    def _latest(self) -> Any:
        with reading(self.address):
            self.table.checkout_latest()
        return self.table

    def _count(self, condition: str) -> int:
        with reading(self.address):
            return self._latest().count_rows(condition)

    def _rows(
        self, condition: str, columns: Sequence[str], of: Callable[[dict[str, Any]], Row]
    ) -> list[Row]:
        """What `of` makes of rows; what it finds damaged makes the gallery unreadable."""
        with reading(self.address):
            query = self._latest().search().where(condition).select(list(columns))
            return list(map(of, query.to_arrow().to_pylist()))

    def _unique(self, column: str) -> list[str]:
        with reading(self.address):
            batches = self._latest().search().where(IS_SCENE).select([column]).to_batches()
            seen: set[str] = set()
            for batch in batches:
                seen.update(batch.column(column).unique().to_pylist())
            return list(seen)
