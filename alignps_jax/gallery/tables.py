"""LanceDB tables with a key, and notes about people."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import operator
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from lancedb.expr import col, lit
from lancedb.index import BTree

from alignps_jax.errors import UserError

# That others cannot read older states any more is what a purge is for.
warnings.filterwarnings("ignore", r"optimize\(cleanup_older_than=0\)")
_INDEXED = {"id", "path", "hash", "taken"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a LanceDB database."""

    database: Any
    name: str

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """LanceDB's table as it is now: what others commit is not seen in the block."""
        with in_one_line(self.database.uri):
            yield self.database.open_table(self.name)

    @property
    def version(self) -> int:
        """Changes with every commit."""
        with self.open() as table:
            return int(table.version)

    def count(self) -> int:
        """The number of rows."""
        with self.open() as table:
            return int(table.count_rows())

    def rows(self, columns: Sequence[str], **values: Collection[str]) -> pa.Table:
        """Columns of the rows that have one of these values in each of these columns."""
        conditions = (col(name).isin(list(some)) for name, some in values.items())
        wanted = functools.reduce(operator.and_, conditions, lit(True))
        with self.open() as table:
            return table.search().where(wanted).select(list(columns)).to_arrow()

    def put(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, of each key the first one, in place of those with the same keys, at once."""
        if rows:
            with self.open() as table:
                key = table.schema.names[0]
                first = list({row[key]: row for row in reversed(rows)}.values())[::-1]
                merge = table.merge_insert(key).when_matched_update_all()
                merge = merge.when_not_matched_insert_all()
                merge.execute(pa.Table.from_pylist(first, table.schema))

    def delete(self, column: str, values: Collection[str]) -> None:
        """Removes the rows with one of these values."""
        if values:
            with self.open() as table:
                table.delete(col(column).isin(list(values)))

    def optimize(self, purge: bool = False) -> None:
        """Puts small files together, updates indices, and drops states older than an hour.

        `purge`: drops whatever holds removed rows: older states, indices, and files, in which a row
        is only marked as removed.
        """
        with self.open() as table:
            if purge:
                for index in table.list_indices():
                    table.drop_index(index.name)
                table.update(values_sql=dict([table.schema.names[:1] * 2]))
            known = {index.columns[0] for index in table.list_indices()}
            for column in _INDEXED.intersection(table.schema.names) - known:
                table.create_index(column, config=BTree())
            table.optimize(cleanup_older_than=datetime.timedelta(hours=0 if purge else 1))


@contextlib.contextmanager
def in_one_line(address: str) -> Iterator[None]:
    """Turns any error of LanceDB into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split()).partition(", /")[0][:800]
        raise UserError(f"--gallery: {address}: {reason or type(error).__name__}") from error


@dataclasses.dataclass(frozen=True)
class Note:
    """Something said about people (their ids), such as a mark: gone once one is forgotten.

    Ids differ, whatever the kind of a note.
    """

    id: str
    people: tuple[str, ...]
    content: Mapping[str, Any]
    at: float = dataclasses.field(default_factory=time.time)


@dataclasses.dataclass(frozen=True)
class Notes:
    """Notes of one kind; servers that write at the same time lose nothing."""

    table: Table
    kind: str

    @property
    def version(self) -> int:
        """Changes with every commit of notes."""
        return self.table.version

    def put(self, notes: Sequence[Note]) -> None:
        """Adds notes, in place of those with the same ids."""
        kind = {"kind": self.kind}
        self.table.put([vars(one) | kind | {"content": json.dumps(one.content)} for one in notes])

    def all(self) -> list[Note]:
        """All notes, the oldest first."""
        rows = self.table.rows(["id", "people", "content", "at"], kind=[self.kind]).sort_by("at")
        return [
            Note(**row | {"people": tuple(row["people"]), "content": json.loads(row["content"])})
            for row in rows.to_pylist()
        ]

    def remove(self, ids: Collection[str]) -> list[Note]:
        """Removes notes; gives those that there were."""
        removed = [note for note in self.all() if note.id in ids]
        self.table.delete("id", [note.id for note in removed])
        return removed
