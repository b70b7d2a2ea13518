"""Runs the parts of the benchmark, prints every row as it comes and keeps it in a file."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import jax
from ml_collections import ConfigDict

from alignps_jax.benchmark import (
    compile,
    data,
    deform_conv,
    evaluate,
    growth,
    inference,
    search,
    toim,
    train,
)
from alignps_jax.benchmark.measure import Context, FloatRate, Row
from alignps_jax.benchmark.report import PartResult, Results, TablePrinter, describe_machine
from alignps_jax.choices import known_name

# By name, in the order in which they run and are reported.
PARTS: dict[str, Callable[[Context], Iterable[Row]]] = {
    "deform_conv": deform_conv.rows,
    "inference": inference.rows,
    "train": train.rows,
    "toim": toim.rows,
    "data": data.rows,
    "evaluate": evaluate.rows,
    "search": search.rows,
    "compile": compile.rows,
    "growth": growth.rows,
}


def run_benchmark(
    config: ConfigDict, what: str | None, workdir: Path, *, runs: int, quick: bool
) -> None:
    """Measures the parts named in `what`, separated by commas (None: all of them).

    Writes `<workdir>/benchmark.json` and, from it, `benchmark.md`, after every row; parts that are
    not measured stay as an earlier run left them.

    Raises:
      UserError: a part does not exist (the nearest is named), `runs` is not positive, or the
        file there is no benchmark's.
    """
    names = chosen_parts(what)
    if runs < 1:
        raise UserError(f"--runs: found {runs}, expected at least 1")
    results = Results.read(workdir / "benchmark.json")
    torch = find_torch()
    context = Context(config, runs, quick, workdir, torch, FloatRate(runs=runs, quick=quick))
    printer = TablePrinter(describe_machine(torch, quick=quick))
    for name in names:
        # As the machine is now: its load changes from part to part.
        part = PartResult(describe_machine(torch, quick=quick), complete=False, rows=())
        for row in PARTS[name](context):
            printer.row(row)
            context.shared[f"{name}: {row.name}"] = row.time.median
            part = dataclasses.replace(part, rows=(*part.rows, row))
            results.write(name, part, order=PARTS)
        results.write(name, dataclasses.replace(part, complete=True), order=PARTS)
    print(f"figures     {results.path}\ntable       {results.path.with_suffix('.md')}")


def chosen_parts(what: str | None) -> list[str]:
    """The parts that `--what` asks for, each once, in the order of `PARTS`."""
    asked = list(PARTS) if what is None else [name.strip() for name in what.split(",")]
    for name in asked:
        known_name("--what", name, PARTS)
    return [name for name in PARTS if name in asked]


def find_torch() -> ModuleType | None:
    """PyTorch, if it and torchvision are installed and it runs on our kind of device."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision")
    except ImportError:
        return None
    same = jax.default_backend() == "cpu" or (
        jax.default_backend() == "gpu" and torch.cuda.is_available()
    )
    return torch if same else None
