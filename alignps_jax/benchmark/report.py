"""The benchmark's figures: as a table that grows row by row, as JSON, and as Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from alignps_jax.benchmark.measure import Row, Timing
from alignps_jax.files import write_atomically
from alignps_jax.types import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "opencv-python-headless", "torch", "torchvision")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and when figures were taken.

    `load` is the number of processes that wanted a core in the minute before; more than about 0
    means that others disturbed the run. `torch` says what PyTorch ran on, "" if it took no part;
    `malloc` is the environment's GLIBC_TUNABLES.
    """

    device: str
    devices: int
    processor: str
    cores: int
    load: float
    torch: str
    versions: Mapping[str, str]
    date: str
    quick: bool
    malloc: str = ""


@dataclasses.dataclass(frozen=True)
class PartResult:
    """The rows of one part, all of one run on one machine; not `complete` if it was cut short."""

    machine: Machine
    complete: bool
    rows: tuple[Row, ...]


def describe_machine(torch: ModuleType | None, *, quick: bool) -> Machine:
    """This machine, now."""
    torch_device = ""
    if torch is not None:
        on_gpu = jax.default_backend() == "gpu"
        torch_device = (
            torch.cuda.get_device_name(0) if on_gpu else f"{torch.get_num_threads()} threads"
        )
    return Machine(
        device=f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
        devices=jax.device_count(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        load=round(os.getloadavg()[0], 2),
        torch=torch_device,
        versions=_versions(),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        quick=quick,
        malloc=os.environ.get("GLIBC_TUNABLES", ""),
    )


@dataclasses.dataclass
class Results:
    """Results by part, and the file that holds them; earlier runs' parts stay until replaced."""

    path: Path
    parts: dict[str, PartResult]

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `path` holds (nothing if it does not exist); UserError if it is something else."""
        if not path.exists():
            return cls(path, {})
        try:
            parts = json.loads(path.read_text())["parts"]
            return cls(path, {name: _part_from_json(part) for name, part in parts.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: found something else, expected the figures of --mode=benchmark"
            ) from error

    def write(self, name: str, part: PartResult, *, order: Iterable[str]) -> None:
        """Replaces a part and writes the JSON, and the Markdown next to it, parts in this order."""
        parts = self.parts | {name: part}
        self.parts = {name: parts[name] for name in order if name in parts}
        document = {"parts": {name: _part_to_json(part) for name, part in self.parts.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(document, indent=2) + "\n").encode())
        write_atomically(self.path.with_suffix(".md"), markdown(self.parts).encode())


# Columns of both tables, with what they say of a row, "" if nothing.
_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "time": lambda row: seconds(row.time.median),
    "range": lambda row: (
        "" if row.time.runs == 1 else f"{seconds(row.time.low)} to {seconds(row.time.high)}"
    ),
    "floor": lambda row: "" if row.floor is None else seconds(row.floor),
    "times floor": lambda row: _ratio(row.floor_ratio),
    "PyTorch": lambda row: "" if row.torch is None else seconds(row.torch.median),
    "PyTorch / ours": lambda row: _ratio(row.torch_ratio),
    "TFLOP/s": lambda row: "" if row.tflops is None else f"{row.tflops:.3f}",
    "bytes": lambda row: "" if row.bytes is None else size(row.bytes),
    "memory": lambda row: "" if row.memory is None else size(row.memory),
    "goal": lambda row: row.goal,
    "note": lambda row: row.note,
}


class TablePrinter:
    """Prints rows as they come, in columns, so that what cuts a run short loses none."""

    # What fits a wide terminal; goals and notes may take several lines.
    _WIDTHS: Mapping[str, int] = {
        "part": 11,
        "name": 34,
        "time": 8,
        "times floor": 7,
        "PyTorch": 8,
        "PyTorch / ours": 7,
        "TFLOP/s": 7,
        "memory": 8,
        "goal": 20,
        "note": 30,
    }

    def __init__(self, machine: Machine, console: Console | None = None):
        self._console = console or Console(width=sum(w + 1 for w in self._WIDTHS.values()))
        self._console.print(machine_line(machine), highlight=False)
        self._print(list(self._WIDTHS))

    def row(self, row: Row) -> None:
        """Prints one row."""
        rest = list(self._WIDTHS)[2:]
        self._print([row.part, row.name, *(_COLUMNS[name](row) for name in rest)])

    def _print(self, cells: Sequence[str]) -> None:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        for name, width in self._WIDTHS.items():
            is_text = name in ("part", "name", "goal", "note")
            table.add_column(width=width, justify="left" if is_text else "right")
        table.add_row(*cells)
        self._console.print(table, highlight=False, markup=False)


def markdown(parts: Mapping[str, PartResult]) -> str:
    """A section with a table for every part; columns that say nothing are left out."""
    return "\n".join(_section(name, part) for name, part in parts.items())


def _section(name: str, part: PartResult) -> str:
    columns = {
        title: cells
        for title, column in _COLUMNS.items()
        if any(cells := [_escape(column(row)) for row in part.rows])
    }
    titles = ["", *columns]
    rule = ["---", *("---" if title in ("goal", "note") else "---:" for title in columns)]
    names = [_escape(row.name) for row in part.rows]
    lines = [titles, rule, *(list(cells) for cells in zip(names, *columns.values(), strict=True))]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    warnings = "" if part.complete else "\n\n**Cut short.**"
    warnings += "\n\n**Quick run: figures without meaning.**" if part.machine.quick else ""
    return f"## {name}{warnings}\n\n{table}\n\n{machine_line(part.machine)}.{_rates(part)}\n"


def _rates(part: PartResult) -> str:
    """The rates of plain convolutions and products behind the floors."""
    rates = sorted(
        row.flops / row.floor / 1e9 for row in part.rows if row.flops and row.floor is not None
    )
    if not rates:
        return ""
    return f" Floors: {rates[0]:.4g} to {rates[-1]:.4g} GFLOP/s, measured after each row."


def machine_line(machine: Machine) -> str:
    """One line: device, threads, versions, date."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    torch = f"PyTorch on {machine.torch}, " if machine.torch else ""
    malloc = f"{machine.malloc}, " if machine.malloc else ""
    return (
        f"{machine.devices} x {machine.device}, {machine.processor}, {machine.cores} cores "
        f"(load {machine.load:g}), {malloc}{torch}{versions}, {machine.date}"
    )


def seconds(value: float) -> str:
    """With three digits and a fitting unit."""
    return _with_unit(value, {"s": 1.0, "ms": 1e3, "µs": 1e6})


def size(value: float) -> str:
    """Bytes, with three digits and a fitting unit."""
    return _with_unit(value, {"GB": 1e-9, "MB": 1e-6, "kB": 1e-3})


def _with_unit(value: float, factors: Mapping[str, float]) -> str:
    """In the first unit of which there is at least one, or in the last."""
    *_, smallest = factors
    unit = next((unit for unit, factor in factors.items() if value * factor >= 1), smallest)
    return f"{_three_digits(value * factors[unit])} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{_three_digits(value)}x"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # torch and torchvision need not be there
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _part_to_json(part: PartResult) -> dict[str, Any]:
    """With the ratios, for whoever reads the file without this module."""
    document = dataclasses.asdict(part)
    for row, fields in zip(part.rows, document["rows"], strict=True):
        fields["ratios"] = {
            "floor": row.floor_ratio,
            "torch": row.torch_ratio,
            "tflops": row.tflops,
        }
    return document


def _part_from_json(document: dict[str, Any]) -> PartResult:
    rows = []
    for fields in document["rows"]:
        fields = {name: value for name, value in fields.items() if name != "ratios"}
        torch = fields["torch"]
        fields |= {"time": Timing(**fields["time"]), "torch": torch and Timing(**torch)}
        rows.append(Row(**fields))
    machine = Machine(**document["machine"])
    return PartResult(machine, document["complete"], tuple(rows))
