"""LanceDB tables with a key `id`: opening, reading, writing; and notes about people."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import operator
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
from lancedb.expr import Expr, col
from lancedb.index import BTree

from alignps_jax.errors import UserError

ID = pa.field("id", pa.string(), nullable=False).with_metadata(
    {"lance-schema:unenforced-primary-key": "true"}
)
# That others cannot read older states any more is what `purge` is for.
warnings.filterwarnings("ignore", r"optimize\(cleanup_older_than=0\)")
_PEOPLE = ("people", pa.list_(pa.string()))
_IN_ONE = 500  # values in one condition
# Older states stay a while for those who read them, unless all have to go.
_KEEP_OLD, _ALL_OLD = datetime.timedelta(hours=1), datetime.timedelta(0)


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


class Table:
    """A table of a LanceDB database, opened when it is needed, and anew after an error.

    It is made where a schema is given and there is none. Rows are chosen by values of columns, or
    lists of values.
    """

    def __init__(self, database: Any, name: str, schema: pa.Schema | None = None):
        self._database, self._name, self._schema = database, name, schema
        self._opened: Any = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """LanceDB's table in its newest state; its errors in the block are one line."""
        with in_one_line(self._database.uri):
            try:
                self._opened = table = self._open() if self._opened is None else self._opened
                yield table
            except Exception:
                self._opened = None
                raise

    def _open(self) -> Any:
        if self._schema is None or self._name in self._database.list_tables(limit=1000).tables:
            return self._database.open_table(self._name)
        return self._database.create_table(self._name, schema=self._schema)

    def pinned(self) -> Self:
        """The same table as it is now, whatever is committed."""
        other = type(self)(self._database, self._name)
        with other.open() as table:
            table.checkout(table.version)
        return other

    @property
    def version(self) -> int:
        """Changes with every commit."""
        with self.open() as table:
            return int(table.version)

    @property
    def columns(self) -> list[str]:
        """Their names."""
        with self.open() as table:
            return list(table.schema.names)

    def count(self, **values: Any) -> int:
        """The number of rows."""
        with self.open() as table:
            return sum(table.count_rows(one and one.to_sql()) for one in _conditions(values))

    def batches(self, columns: Sequence[str], **values: Any) -> Iterator[pa.RecordBatch]:
        """Columns of rows, some rows at a time."""
        with self.open() as table:
            for one in _conditions(values):
                query = table.search() if one is None else table.search().where(one)
                yield from query.select(list(columns)).to_batches()

    def rows(self, columns: Sequence[str], **values: Any) -> pa.Table:
        """Columns of rows."""
        with self.open() as table:
            none = pa.schema([table.schema.field(name) for name in columns])
        found = list(self.batches(columns, **values))
        return pa.Table.from_batches(found, found[0].schema if found else none)

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
        """Removes rows."""
        with self.open() as table:
            for one in _conditions(values):
                table.delete(one)

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
        Where nobody else writes (`alone`), what interrupted writers left goes as well.
        """
        with self.open() as table:
            for index in table.list_indices():
                table.drop_index(index.name)
            table.update(values_sql={"id": "id"})
            table.optimize(cleanup_older_than=_ALL_OLD, delete_unverified=alone)


def _conditions(values: Mapping[str, Any]) -> list[Expr | None]:
    """What rows must fulfil to have these values: one of the conditions, all of it."""
    if not values:
        return [None]
    choices = [
        [col(name).isin(value[at : at + _IN_ONE]) for at in range(0, len(value), _IN_ONE)]
        if isinstance(value, list)
        else [col(name) == value]
        for name, value in values.items()
    ]
    return [functools.reduce(operator.and_, some) for some in itertools.product(*choices)]


@dataclasses.dataclass(frozen=True)
class Note:
    """Something said about people (their ids), such as a mark: gone once one is forgotten."""

    id: str
    people: tuple[str, ...]
    content: Mapping[str, Any]
    at: float = dataclasses.field(default_factory=time.time)


class Notes:
    """Notes of one kind; servers that write at the same time lose nothing."""

    SCHEMA = pa.schema(
        [ID, ("kind", pa.string()), ("content", pa.string()), ("at", pa.float64()), _PEOPLE]
    )

    def __init__(self, table: Table, kind: str):
        self._table, self._kind = table, kind

    def put(self, notes: Sequence[Note]) -> None:
        """Adds notes, in place of those with the same ids."""
        if notes:
            rows = [vars(one) | {"content": json.dumps(one.content)} for one in notes]
            own = [row | {"kind": self._kind, "id": self._key(row["id"])} for row in rows]
            self._table.put(pa.Table.from_pylist(own, self.SCHEMA))

    def all(self) -> list[Note]:
        """All notes, the oldest first."""
        rows = self._table.rows(self.SCHEMA.names, kind=self._kind).sort_by("at").to_pylist()
        return [
            Note(one["id"][len(self._key("")) :], tuple(one["people"]), content, one["at"])
            for one in rows
            for content in [json.loads(one["content"])]
        ]

    def remove(self, ids: Collection[str]) -> list[Note]:
        """Removes notes; gives those that there were."""
        removed = [note for note in self.all() if note.id in ids]
        self._table.delete(id=[self._key(note.id) for note in removed])
        return removed

    def _key(self, identity: str) -> str:
        return f"{self._kind} {identity}"

    @property
    def version(self) -> int:
        """Changes with every commit, also of notes of other kinds."""
        return self._table.version

    def __len__(self) -> int:
        return self._table.count(kind=self._kind)
