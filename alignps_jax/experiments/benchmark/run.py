"""Runs parts of a benchmark, prints every row as it comes and keeps it in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
from ml_collections import ConfigDict

from alignps_jax.errors import known_name
from alignps_jax.experiments.benchmark.measure import Row, timed
from alignps_jax.experiments.benchmark.parts import PARTS, Context
from alignps_jax.experiments.benchmark.report import PartResult, Report, machine_line
from alignps_jax.types import UserError

C = TypeVar("C", bound=Context)


def run_benchmark(
    config: ConfigDict, what: str | None, workdir: Path, *, runs: int, quick: bool
) -> None:
    """Measures the parts named in `what`, separated by commas (None: all of them).

    Writes `<workdir>/benchmark.json` and, from it, `benchmark.md`.

    Raises:
      UserError: a part does not exist (the nearest is named), `runs` is not positive, there are
        several processes, or the file there is no benchmark's.
    """
    if jax.process_count() > 1:
        raise UserError(f"--processes: found {jax.process_count()}, --mode=benchmark expects 1")
    context = Context(config, runs, quick)
    rows = {
        name: lambda context, name=name, part=part: timed(name, part(context), runs=context.runs)
        for name, part in PARTS.items()
    }
    run_parts(rows, what, context, Report(workdir / "benchmark.json"))


def run_parts(
    parts: Mapping[str, Callable[[C], Iterable[Row]]],
    what: str | None,
    context: C,
    report: Report,
) -> None:
    """Prints every row as it comes, and writes the report after each, so that none is lost."""
    names = chosen_parts(what, parts)
    if context.runs < 1:
        raise UserError(f"--runs: found {context.runs}, expected at least 1")
    report.print_header()
    for name in names:
        # The load of the machine changes from part to part.
        part = PartResult(machine_line(), context.quick, complete=False, rows=())
        for row in parts[name](context):
            report.print(row)
            part = dataclasses.replace(part, rows=(*part.rows, row))
            report.write(name, part, order=parts)
        report.write(name, dataclasses.replace(part, complete=True), order=parts)
    print(f"figures     {report.path}\ntable       {report.path.with_suffix('.md')}")


def chosen_parts(what: str | None, parts: Collection[str]) -> list[str]:
    """The parts that `--what` asks for, each once, in the order of `parts`."""
    asked = list(parts) if what is None else [name.strip() for name in what.split(",")]
    for name in asked:
        known_name("--what", name, parts)
    return [name for name in parts if name in asked]
