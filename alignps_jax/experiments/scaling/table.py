"""Rows that appear one by one, and stay in a JSON file with a Markdown table beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignps_jax.experiments.benchmark.report import table_line
from alignps_jax.files import read_json, write_atomically, write_json
from alignps_jax.types import UserError


class Table:
    """The rows of a file.

    Args:
      path: the JSON file. Its rows stay until one with the same `key` replaces them.
      row_type: makes a row, a dataclass, of its fields. Of a row, `key` is what it is about and
        `origin` says with what and when it was made.
      columns: text of a row, by title.
      note: what holds for all rows.

    Raises:
      UserError: the file holds something else.
    """

    def __init__(
        self,
        path: Path,
        row_type: Callable[..., Any],
        columns: Mapping[str, Callable[[Any], str]],
        note: str = "",
    ):
        self._path, self._row_type, self._columns, self._note = path, row_type, columns, note
        self.rows = self._read()

    def _read(self) -> dict[Any, Any]:
        expected = "rows of this mode"
        content = read_json(self._path, expected) if self._path.exists() else {"rows": []}
        try:
            rows = [self._row_type(**_with_tuples(row)) for row in content["rows"]]
            self._markdown(rows)
            return {row.key: row for row in rows}
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self._path}: found something else, expected {expected}") from error

    def add(self, row: Any) -> None:
        """Prints a row, and writes both files."""
        cells = {title: column(row) for title, column in self._columns.items()}
        print("; ".join(f"{title} {text}" for title, text in cells.items() if text), flush=True)
        self.rows = self._read() | {row.key: row}  # another run may have added some
        rows = list(self.rows.values())
        write_json(self._path, {"note": self._note, "rows": list(map(dataclasses.asdict, rows))})
        write_atomically(self._path.with_suffix(".md"), self._markdown(rows).encode())

    def say_where(self) -> None:
        """The files, in two lines."""
        print(f"figures     {self._path}\ntable       {self._path.with_suffix('.md')}")

    def _markdown(self, rows: Sequence[Any]) -> str:
        """The note, the table without columns that say nothing, and where the rows come from."""
        cells = {title: list(map(column, rows)) for title, column in self._columns.items()}
        kept = {title: column for title, column in cells.items() if any(column)}
        lines = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
        table = "\n".join(map(table_line, lines))
        origins = dict.fromkeys(row.origin for row in rows)
        return "\n\n".join(filter(None, [self._note, table, *origins])) + "\n"


def _with_tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
