"""LanceDB tables with a key, and notes about people."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import operator
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
from lancedb.expr import col
from lancedb.index import BTree

from alignps_jax.errors import UserError

_INDEXED = {"id", "path", "hash", "taken"}
# Older states stay a while for those who read them, unless all have to go.
_KEEP_OLD, _ALL_OLD = datetime.timedelta(hours=1), datetime.timedelta(0)
_TYPES: Mapping[Any, pa.DataType] = {
    **{str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()},
    **{float | None: pa.float64(), datetime.datetime | None: pa.timestamp("us")},
}


def columns_of(record: type) -> dict[str, pa.DataType]:
    """The fields of a dataclass as columns."""
    return {name: _TYPES[kind] for name, kind in get_type_hints(record).items()}


def keyed(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """A schema whose first column is the key: of rows that are put at once, one stays."""
    key, *others = columns.items()
    metadata = {"lance-schema:unenforced-primary-key": "true"}
    return pa.schema([pa.field(*key, nullable=False, metadata=metadata), *others])


class Table:
    """A table of a LanceDB database; its errors are UserErrors of one line."""

    def __init__(self, database: Any, name: str, schema: pa.Schema | None = None):
        """Makes the table where a schema is given and there is none."""
        self._database, self._name = database, name
        with in_one_line(database.uri):
            try:
                database.open_table(name)
            except ValueError:
                if schema is None:
                    raise
                database.create_table(name, schema=schema, exist_ok=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """LanceDB's table as it is now: what others commit is not seen in the block."""
        with in_one_line(self._database.uri):
            yield self._database.open_table(self._name)

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
        conditions = [col(name).isin(list(some)) for name, some in values.items()]
        with self.open() as table:
            query = table.search().select(list(columns))
            if conditions:
                query = query.where(functools.reduce(operator.and_, conditions))
            return query.to_arrow()

    def put(self, rows: pa.Table) -> None:
        """Adds rows, of each key the first one, in place of those with the same keys, at once."""
        key = rows.column_names[0]
        first = np.unique(rows[key].to_numpy(), return_index=True)[1]
        if len(first):
            with self.open() as table:
                merge = table.merge_insert(key).when_matched_update_all()
                merge.when_not_matched_insert_all().execute(rows.take(np.sort(first)))

    def delete(self, column: str, values: Collection[str]) -> None:
        """Removes the rows with one of these values."""
        if values:
            with self.open() as table:
                table.delete(col(column).isin(list(values)))

    def optimize(self) -> None:
        """Puts small files together, brings the indices of columns up to date, drops old states."""
        with self.open() as table:
            known = {index.columns[0] for index in table.list_indices()}
            for column in _INDEXED.intersection(table.schema.names) - known:
                table.create_index(column, config=BTree())
            table.optimize(cleanup_older_than=_KEEP_OLD)

    def purge(self) -> None:
        """Writes everything anew without the removed rows, and deletes all older states.

        A removed row is only marked as such in its file; older states and indices hold it, too.
        """
        with self.open() as table:
            for index in table.list_indices():
                table.drop_index(index.name)
            key = table.schema.names[0]
            table.update(values_sql={key: key})
            table.optimize(cleanup_older_than=_ALL_OLD)


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
    """Something said about people (their ids), such as a mark: gone once one is forgotten."""

    id: str
    people: tuple[str, ...]
    content: Mapping[str, Any]
    at: float = dataclasses.field(default_factory=time.time)


_NOTES = {"key": str, "kind": str, "id": str, "content": str, "at": float}
NOTES = keyed({n: _TYPES[t] for n, t in _NOTES.items()} | {"people": pa.list_(pa.string())})


class Notes:
    """Notes of one kind; servers that write at the same time lose nothing."""

    def __init__(self, table: Table, kind: str):
        self.table, self._kind = table, kind

    def put(self, notes: Sequence[Note]) -> None:
        """Adds notes, in place of those with the same ids."""
        own = {"kind": self._kind}
        rows = [
            vars(one) | own | {"key": self._key(one.id), "content": json.dumps(one.content)}
            for one in notes
        ]
        self.table.put(pa.Table.from_pylist(rows, NOTES))

    def all(self) -> list[Note]:
        """All notes, the oldest first."""
        rows = self.table.rows(["id", "people", "content", "at"], kind=[self._kind]).sort_by("at")
        return [
            Note(row["id"], tuple(row["people"]), json.loads(row["content"]), row["at"])
            for row in rows.to_pylist()
        ]

    def remove(self, ids: Collection[str]) -> list[Note]:
        """Removes notes; gives those that there were."""
        removed = [note for note in self.all() if note.id in ids]
        self.table.delete("key", [self._key(note.id) for note in removed])
        return removed

    def _key(self, identity: str) -> str:
        return f"{self._kind} {identity}"

    @property
    def version(self) -> int:
        """Changes with every commit of notes."""
        return self.table.version
