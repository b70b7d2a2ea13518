"""Rows that appear one by one, and stay in a JSON file with a Markdown table beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignps_jax.experiments.benchmark.report import table_line
from alignps_jax.files import write_atomically, write_json
from alignps_jax.types import UserError


class Table:
    """The rows of a file.

    Args:
      path: the JSON file. Its rows stay until one with the same `key` replaces them.
      row_type: the dataclass of the rows, with a property `key`.
      columns: text of a row, by title.

    Raises:
      UserError: the file holds something else.
    """

    def __init__(
        self, path: Path, row_type: Any, columns: Mapping[str, Callable[[Any], str]], note: str = ""
    ):
        self._path, self._columns, self._note = path, columns, note
        try:
            found = json.loads(path.read_text())["rows"] if path.exists() else []
            rows = [row_type(**row) for row in found]
            self.rows = {row.key: row for row in rows}
            self._markdown()
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{path}: found something else, expected rows of this mode") from error

    def print_header(self) -> None:
        """What holds for all rows."""
        if self._note:
            print(self._note, flush=True)

    def add(self, row: Any) -> None:
        """Prints a row, and writes both files."""
        cells = {title: column(row) for title, column in self._columns.items()}
        print("; ".join(f"{title} {text}" for title, text in cells.items() if text), flush=True)
        self.rows[row.key] = row
        document = {"note": self._note, "rows": [dataclasses.asdict(x) for x in self.rows.values()]}
        write_json(self._path, document)
        write_atomically(self._path.with_suffix(".md"), self._markdown().encode())

    def say_where(self) -> None:
        """The files, in two lines."""
        print(f"figures     {self._path}\ntable       {self._path.with_suffix('.md')}")

    def _markdown(self) -> str:
        cells = {
            title: list(map(column, self.rows.values())) for title, column in self._columns.items()
        }
        kept = {title: column for title, column in cells.items() if any(column)}
        lines = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
        return "\n".join([*([self._note, ""] if self._note else []), *map(table_line, lines), ""])
