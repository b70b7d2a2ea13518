"""Compiles steps ahead of time for chips that are not here; a row of a table for each."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark.report import seconds as seconds_text
from alignps_jax.experiments.benchmark.report import size, three_digits
from alignps_jax.experiments.scaling.cases import (
    ARITHMETIC,
    Case,
    how_computed,
    products_of,
    usable,
)
from alignps_jax.experiments.scaling.chips import Chip, Topology
from alignps_jax.experiments.scaling.compile import Request
from alignps_jax.experiments.scaling.table import Table

_COMPILE = (sys.executable, "-m", "alignps_jax.experiments.scaling.compile")
_ROOT = Path(__file__).parents[3]
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
_NOTE = (
    "Compiled ahead of time; nothing ran. Estimates are no measurements: they are cycles of the "
    "TPU's compiler, or arithmetic and bytes over what a GPU's data sheet promises."
)
# What a compiler's complaint begins with, the most telling first.
_COMPLAINTS = (
    r"Used [\d.]+[KMGT] of [\d.]+[KMGT] hbm.*?(?=\. |$)",
    r"Check failed.*",
    r"RESOURCE_EXHAUSTED.*",
    r"[A-Z_]{6,}: .*",
    r"\w+Error: .*",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A step on a topology: what its program is like, or the `problem` of compiling it.

    Memory and bytes are those of one device, `estimates` seconds by kind of work (`seconds`).
    """

    topology: str
    step: str
    size: tuple[int, int]
    batch: int
    dtype: str
    precision: str
    origin: str
    remat: bool = False
    problem: str = ""
    devices: int = 0
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    host_memory: float = 0.0
    peak_memory: float = 0.0
    code: float = 0.0
    chip_memory: float | None = None
    flops: float = 0.0
    kernels: int = 0
    bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)
    collective_counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cycles: Mapping[str, float] = dataclasses.field(default_factory=dict)
    most_cycles: float = 0.0
    estimates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was compiled for what: a later row of the same replaces this one."""
        return self.topology, self.step, self.size, self.batch, self.type

    @property
    def products(self) -> str:
        return products_of(self.dtype, self.precision)

    @property
    def type(self) -> str:
        return how_computed(self.step, self.products, remat=self.remat)

    @property
    def dominates(self) -> str:
        """What takes most of the estimated time, with its share of all of it."""
        total = sum(self.estimates.values())
        name = max(self.estimates, key=self.estimates.__getitem__, default="")
        return f"{name} ({self.estimates[name] / total:.0%})" if total else ""


def run_gate(
    config: ConfigDict, topologies: Sequence[Topology], steps: Sequence[Case], target: Path
) -> None:
    """Compiles every step for every topology, one after the other; keeps and prints each row.

    The rows of an earlier run stay in `target` until they are replaced.

    Raises:
      UserError: `target` holds something else, or cannot be written.
    """
    table = Table(target, Row, _COLUMNS, _NOTE)
    print(_NOTE, flush=True)
    for topology in topologies:
        for case in steps:
            table.add(compile_row(config, topology, case))
    table.say_where()


def compile_row(
    config: ConfigDict, topology: Topology, case: Case, command: Sequence[str] = _COMPILE
) -> Row:
    """Compiles a step in a process of its own, with what it says for a row."""
    dtype, precision = ARITHMETIC[case.step](config)
    row = Row(
        topology=topology.name,
        step=case.step,
        size=case.size,
        batch=case.batch,
        dtype=dtype,
        precision=precision,
        remat=config.model.remat,
        origin=f"{datetime.date.today().isoformat()}: {_versions()}.",
        chip_memory=topology.chip.memory,
    )
    answer = _ask(Request(usable(config).to_dict(), topology, case), command)
    if "problem" in answer:
        return dataclasses.replace(row, problem=_complaint(answer["problem"]))
    row = dataclasses.replace(row, **answer)
    if row.chip_memory is not None and row.peak_memory > row.chip_memory:
        problem = f"does not fit: {size(row.peak_memory)} of {size(row.chip_memory)}"
        row = dataclasses.replace(row, problem=problem)
    return dataclasses.replace(row, estimates=seconds(row, topology.chip))


def _ask(request: Request, command: Sequence[str]) -> dict[str, Any]:
    """The answer of the process; what ended it instead is a problem of the compiler."""
    environment = {**os.environ, **request.topology.environment()}
    paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            command,
            input=pickle.dumps(request),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            check=False,
        )
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if done.returncode == 0:
        return json.loads(done.stdout.decode().strip().splitlines()[-1])
    if done.returncode > 0:
        return {"problem": said}
    name = signal.Signals(-done.returncode).name
    return {"problem": f"{said}\nthe compiler ended with {name}"}


def _complaint(said: str) -> str:
    """The line of a compiler's output that tells most."""
    ended = re.search(r"the compiler ended with (\w+)$", said)
    for pattern in _COMPLAINTS:
        if found := re.search(pattern, said, re.MULTILINE):
            line = " ".join(found[0].split())[:200]
            return f"{ended[1]}: {line}" if ended else line
    return ended[0] if ended else "the compiler said nothing"


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def seconds(row: Row, chip: Chip) -> dict[str, float]:
    """Estimated seconds of what a step does, none of which was measured.

    TPU: the cycles of its compiler (at 1 GHz if the clock is not known). GPU: arithmetic at the
    peak, each kernel's bytes at the bandwidth, and what all-reduces send at the speed of the links.
    """
    if row.cycles:
        return {kind: cycles / (chip.clock or 1e9) for kind, cycles in row.cycles.items()}
    if not chip.peak or chip.bandwidth is None:
        return {}
    found = {"arithmetic": row.flops / chip.peak[row.products]}
    found |= {f"memory of {kind}": moved / chip.bandwidth for kind, moved in row.bytes.items()}
    if chip.link is not None and row.collectives:
        found["collectives"] = 2 * sum(row.collectives.values()) / chip.link
    return found


def _estimate(row: Row) -> str:
    """Cycles of a TPU; of a GPU, what arithmetic, memory and collectives would take alone."""
    if row.cycles:
        least, most = sum(row.cycles.values()) / 1e6, row.most_cycles / 1e6
        return f"{least:.0f}M" + (f" to {most:.0f}M" if most > 1.005 * least else "") + " cycles"
    sums: dict[str, float] = {}
    for kind, value in row.estimates.items():
        name = kind.partition(" ")[0]
        sums[name] = sums.get(name, 0.0) + value
    return ", ".join(f"{name} {seconds_text(value)}" for name, value in sums.items())


def _of_memory(row: Row) -> str:
    share = f" ({row.peak_memory / row.chip_memory:.0%})" if row.chip_memory else ""
    return f"{size(row.peak_memory)}{share}"


def _collectives(row: Row) -> str:
    return ", ".join(
        f"{row.collective_counts[kind]:.0f} {kind} {size(arrived)}"
        for kind, arrived in row.collectives.items()
    )


def _if_compiled(column: Any) -> Any:
    return lambda row: column(row) if row.devices else ""


_COLUMNS = {
    "topology": lambda row: row.topology,
    "step": lambda row: f"{row.step} {row.size[1]}×{row.size[0]}",
    "batch": lambda row: str(row.batch),
    "type": lambda row: row.type,
    "result": lambda row: row.problem or "compiles",
    "compile": _if_compiled(lambda row: f"{row.trace_seconds + row.compile_seconds:.0f} s"),
    "peak memory": _if_compiled(_of_memory),
    "arithmetic": _if_compiled(lambda row: f"{three_digits(row.flops / 1e9)} GFLOP"),
    "bytes": _if_compiled(lambda row: size(sum(row.bytes.values()))),
    "kernels": _if_compiled(lambda row: f"{row.kernels:,}"),
    "collectives": _collectives,
    "estimate": _estimate,
    "dominates": lambda row: row.dominates,
}
