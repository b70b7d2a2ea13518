"""LanceDB tables with a key `id`: opening, reading, writing; and notes about people."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import operator
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
from lancedb.expr import Expr, col
from lancedb.index import BTree

from alignps_jax.errors import UserError

KEY = {"lance-schema:unenforced-primary-key": "true"}
NOTES = "notes_"
_IN_ONE = 500  # values in one condition
# Older states stay a while for those who read them, unless all have to go.
_KEEP_OLD, _ALL_OLD = datetime.timedelta(hours=1), datetime.timedelta(0)


class Table:
    """A table of a LanceDB database, opened when it is needed, and anew after an error.

    Conditions are values of columns, or lists of them, that rows must have.
    """

    def __init__(self, database: Any, name: str, schema: pa.Schema | None = None):
        """Has a missing table made where a schema is given."""
        self._database, self._name, self._schema = database, name, schema
        self._opened: Any = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """LanceDB's table in its newest state; UserError (one line) for its errors in the block."""
        with in_one_line(self._database.uri):
            try:
                table = self._open() if self._opened is None else self._opened
                self._opened = table
                yield table
            except Exception:
                self._opened = None
                raise

    def _open(self) -> Any:
        for wait in (0.05, 0.2, 0.8, 0.0):
            try:
                if self._schema is None or self.exists:
                    return self._database.open_table(self._name)
                return self._database.create_table(self._name, schema=self._schema)
            except (ValueError, RuntimeError):
                # While another process makes it, it is neither there nor missing.
                if self._schema is None or not wait:
                    raise
                time.sleep(wait)

    def pinned(self) -> Self:
        """The same table as it is now, whatever is committed."""
        other = type(self)(self._database, self._name)
        with other.open() as table:
            table.checkout(table.version)
        return other

    @property
    def exists(self) -> bool:
        """Whether the table was made."""
        return self._opened is not None or self._name in table_names(self._database)

    @property
    def version(self) -> int:
        """Changes with every commit."""
        with self.open() as table:
            return int(table.version)

    def count(self, **values: Any) -> int:
        """The number of rows with these values."""
        with self.open() as table:
            return int(table.count_rows(having(**values).to_sql() if values else None))

    def rows(self, columns: Sequence[str], **values: Any) -> pa.Table:
        """Columns of the rows with these values."""
        with self.open() as table:
            return self._query(table, columns, values).to_arrow()

    def batches(self, columns: Sequence[str], **values: Any) -> Iterator[pa.RecordBatch]:
        """The same, some rows at a time."""
        with self.open() as table:
            yield from self._query(table, columns, values).to_batches()

    def _query(self, table: Any, columns: Sequence[str], values: Mapping[str, Any]) -> Any:
        query = table.search().where(having(**values)) if values else table.search()
        return query.select(list(columns))

    def put(self, rows: pa.Table) -> None:
        """Adds rows, of each id the first one, in place of those with the same ids, in one commit.

        So of copies that were looked at one counts, and boxes that are the same to a pixel are one
        person.
        """
        first = np.unique(rows["id"].to_numpy(), return_index=True)[1]
        with self.open() as table:
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows.take(np.sort(first)))

    def delete(self, **values: Any) -> None:
        """Removes the rows with these values."""
        with self.open() as table:
            table.delete(having(**values))

    def optimize(self, indexed: Sequence[str]) -> None:
        """Puts small files together, brings the indices of columns up to date, drops old states."""
        with self.open() as table:
            known = {index.columns[0] for index in table.list_indices()}
            for column in [name for name in indexed if name not in known]:
                table.create_index(column, config=BTree())
            table.optimize(cleanup_older_than=_KEEP_OLD)

    def purge(self, alone: bool) -> None:
        """Writes everything anew without the removed rows, and deletes all older states.

        A removed row is only marked as such in its file; older states and indices hold it, too.
        Where this is the only writer (`alone`), what interrupted writers left goes as well.
        """
        with self.open() as table:
            for index in table.list_indices():
                table.drop_index(index.name)
            table.update(values_sql={"id": "id"})
            table.optimize(cleanup_older_than=_ALL_OLD, delete_unverified=alone)


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


def having(**values: Any) -> Expr:
    """The condition that columns have these values, or one of them where it is a list."""
    conditions = (
        col(name).isin(value) if isinstance(value, list) else col(name) == value
        for name, value in values.items()
    )
    return functools.reduce(operator.and_, conditions)


def table_names(database: Any) -> list[str]:
    """The names of all tables."""
    return list(database.list_tables(limit=1000).tables)


@dataclasses.dataclass(frozen=True)
class Note:
    """Something said about people (their ids), such as a mark: gone once one is forgotten."""

    id: str
    people: tuple[str, ...]
    content: Mapping[str, Any]
    at: float = dataclasses.field(default_factory=time.time)


class Notes:
    """Notes of one kind; servers that write at the same time lose nothing."""

    _SCHEMA = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=KEY),
            pa.field("people", pa.list_(pa.string())),
            pa.field("content", pa.string()),
            pa.field("at", pa.float64()),
        ]
    )

    def __init__(self, database: Any, name: str):
        self.table = Table(database, f"{NOTES}{name}", self._SCHEMA)

    def put(self, notes: Sequence[Note]) -> None:
        """Adds notes, in place of those with the same ids."""
        rows = [vars(note) | {"content": json.dumps(note.content)} for note in notes]
        self.table.put(pa.Table.from_pylist(rows, self._SCHEMA))

    def all(self) -> list[Note]:
        """All notes, the oldest first."""
        if not self.table.exists:
            return []
        return [
            Note(row["id"], tuple(row["people"]), json.loads(row["content"]), row["at"])
            for row in self.table.rows(self._SCHEMA.names).sort_by("at").to_pylist()
        ]

    def remove(self, ids: Collection[str]) -> list[Note]:
        """Removes notes; gives those that there were."""
        removed = [note for note in self.all() if note.id in ids]
        for some in parts(note.id for note in removed):
            self.table.delete(id=some)
        return removed

    @property
    def version(self) -> int:
        """Changes with every commit."""
        return self.table.version if self.table.exists else 0


def parts(values: Iterable[str]) -> Iterator[list[str]]:
    """The values, not too many for one condition."""
    some = sorted(values)
    return (some[start : start + _IN_ONE] for start in range(0, len(some), _IN_ONE))
