"""The benchmark's figures as lines that appear one by one, as JSON, and as Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from alignps_jax.experiments.benchmark.measure import Row, Timing
from alignps_jax.files import check_outputs, read_json, write_atomically, write_json
from alignps_jax.types import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "opencv-python-headless")
_NAME_WIDTH = 44


def seconds(value: float) -> str:
    """With three digits and a fitting unit."""
    return _with_unit(value, {"s": 1.0, "ms": 1e3, "µs": 1e6})


def size(value: float) -> str:
    """Bytes, with three digits and a fitting unit."""
    return _with_unit(value, {"GB": 1e-9, "MB": 1e-6, "kB": 1e-3})


def three_digits(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _with_unit(value: float, factors: Mapping[str, float]) -> str:
    """In the first unit of which there is at least one, or in the last."""
    *_, smallest = factors
    unit = next((unit for unit, factor in factors.items() if value * factor >= 1), smallest)
    return f"{three_digits(value * factors[unit])} {unit}"


# The columns of both tables; each says "" of a row about which it knows nothing.
Columns = Mapping[str, Callable[[Row], str]]
COLUMNS: Columns = {
    "time": lambda row: seconds(row.time.median),
    "range": lambda row: (
        "" if row.time.runs == 1 else f"{seconds(row.time.low)} to {seconds(row.time.high)}"
    ),
    "throughput": lambda row: (
        "" if row.throughput is None else f"{three_digits(row.throughput)} {row.unit}/s"
    ),
    "memory": lambda row: "" if row.memory is None else size(row.memory),
    "compile": lambda row: "" if row.compile is None else seconds(row.compile),
    "note": lambda row: row.note,
}
# These are aligned to the left.
_TEXT = ("goal", "note")


def machine_line() -> str:
    """Devices, processor, load, versions and the date. A load above 0 means disturbances."""
    parts = (
        f"{jax.device_count()} x {jax.default_backend()} ({jax.devices()[0].device_kind})",
        _processor(),
        f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.2f})",
        os.environ.get("GLIBC_TUNABLES", ""),
        *(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES),
        datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    return ", ".join(filter(None, parts))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclasses.dataclass(frozen=True)
class PartResult:
    """The rows of one part, all of one run on one machine; not `complete` if it was cut short."""

    machine: str
    quick: bool
    complete: bool
    rows: tuple[Row, ...]


class Report:
    """The file with all figures, its tables, and the lines on stdout.

    Args:
      path: the JSON file. The parts of an earlier run stay in it until they are replaced.
      columns: of the tables, by their titles.
      row_type: the type of the rows.

    Raises:
      UserError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, columns: Columns = COLUMNS, row_type: type[Row] = Row):
        self.path, self._columns = path, columns
        check_outputs(path, path.with_suffix(".md"))
        expected = "the figures of a benchmark"
        content = read_json(path, expected) if path.exists() else {"parts": {}}
        try:
            parts = content["parts"].items()
            self.parts = {name: _part_of(part, row_type) for name, part in parts}
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: found something else, expected {expected}") from error

    def write(self, name: str, part: PartResult, *, order: Iterable[str]) -> None:
        """Replaces a part and writes the JSON, and the Markdown next to it, parts in this order."""
        parts = self.parts | {name: part}
        self.parts = {known: parts[known] for known in order if known in parts}
        document = {name: dataclasses.asdict(part) for name, part in self.parts.items()}
        write_json(self.path, {"parts": document})
        write_atomically(self.path.with_suffix(".md"), self.markdown().encode())

    def print_header(self) -> None:
        """The machine and the titles of the columns."""
        print(machine_line(), flush=True)
        self._print("", {title: title for title in self._columns})

    def print(self, row: Row) -> None:
        """One row in a line."""
        cells = {title: column(row) for title, column in self._columns.items()}
        self._print(f"{row.part}: {row.name}", cells)

    def _print(self, name: str, cells: Mapping[str, str]) -> None:
        numbers = [f"{text:>17}" for title, text in cells.items() if title not in (*_TEXT, "range")]
        texts = "; ".join(filter(None, (cells.get(title, "") for title in _TEXT)))
        print(f"{name:<{_NAME_WIDTH}}{''.join(numbers)}  {texts}".rstrip(), flush=True)

    def markdown(self) -> str:
        """A section with a table for every part; columns that say nothing are left out."""
        return "\n".join(self._section(name, part) for name, part in self.parts.items())

    def _section(self, name: str, part: PartResult) -> str:
        columns = {
            title: cells
            for title, column in self._columns.items()
            if any(cells := [column(row) for row in part.rows])
        }
        rule = ["---", *("---" if title in _TEXT else "---:" for title in columns)]
        rows = zip([row.name for row in part.rows], *columns.values(), strict=True)
        warnings = "" if part.complete else "\n\n**Cut short.**"
        warnings += "\n\n**Quick run: figures without meaning.**" if part.quick else ""
        table = "\n".join(table_line(line) for line in (["", *columns], rule, *rows))
        return f"## {name}{warnings}\n\n{table}\n\n{part.machine}.\n"


def table_line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _part_of(document: dict, row_type: type[Row]) -> PartResult:
    rows: list[dict[str, Any]] = [
        {key: Timing(**x) if isinstance(x, dict) else x for key, x in row.items()}
        for row in document["rows"]
    ]
    return PartResult(**(document | {"rows": tuple(row_type(**row) for row in rows)}))
