"""`--mode=scaling`: steps compiled for chips that are not here, or measured on devices that are."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from alignps_jax.devices import Devices
from alignps_jax.experiments.benchmark import (
    Case,
    Row,
    Table,
    cases,
    make_program,
    peak_memory,
    run_case,
)
from alignps_jax.experiments.chips import CHIPS, devices_of, parse_topologies
from alignps_jax.nn.platforms import for_every_platform
from alignps_jax.types import UserError


def run_scaling(
    config: ConfigDict,
    topology: str | None,
    what: str | None,
    batch: int | None,
    runs: int,
    target: Path,
) -> None:
    """Compiles steps for the chips of `topology`, or measures them on the devices that are here.

    The steps named in `what` (None: both) have `batch` images on each device (None:
    `train.batch_size`). Without a `topology`, it measures. `target` is a `Table`'s JSON file.

    Raises:
      UserError: an argument is wrong, a compiler is missing, or, in the end, a step does not fit.
    """
    steps = cases(config, what, batch or config.train.batch_size)
    goals, table = parse_topologies(topology) if topology else [], Table(target)
    if not goals:
        for row in (row for case in steps for row in measure(config, case, jax.devices(), runs)):
            table.add(row)
    rows = [compile_ahead(config, goal, case, table) for goal in goals for case in steps]
    if problems := sum(row["result"] != "fits" for row in rows):
        raise UserError(f"{target}: {problems} of {len(rows)} steps do not compile or do not fit")


def compile_ahead(config: ConfigDict, topology: str, case: Case, table: Table) -> Row:
    """Whether a step compiles for chips and fits there, with its costs on one device as XLA says.

    It compiles in a process of its own, since a compiler may abort, and needs other devices.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            costs = pool.submit(_compile, config.to_dict(), topology, case).result()
        except BrokenProcessPool:
            costs = {"result": "the compiler aborts and says why above"}
    row = {"what": f"{topology}, {case}", "result": "fits", **costs}
    if "memory, GB" in row:
        share = row["memory, GB"] / CHIPS[topology.partition(":")[0]][0]
        row |= {"of the chip": f"{share:.0%}", "result": "fits" if share <= 1 else "does not fit"}
    table.add({**row, "jax": jax.__version__})
    return row


def _compile(config: dict[str, Any], topology: str, case: Case) -> Row:
    """The costs of a step, or why it does not compile."""
    try:
        with for_every_platform():
            program = make_program(ConfigDict(config), case, devices_of(topology))
    except jax.errors.JaxRuntimeError as error:
        return {"result": " ".join(str(error).split())[:200]}
    row = {"memory, GB": peak_memory(program.compiled), "compile, s": program.seconds}
    costs: Any = program.compiled.cost_analysis() or {}  # XLA has none for GPUs
    titles = {"flops": "GFLOP", "bytes accessed": "GB moved"}
    return row | {titles[name]: costs[name] / 1e9 for name in titles if name in costs}


def measure(config: ConfigDict, case: Case, devices: Devices, runs: int) -> Iterator[Row]:
    """Weak scaling, with `case.batch` images of each device, and strong scaling, which shares them.

    A step that fails, as it does not fit, is a row that says so.
    """
    counts = sorted({*(2**power for power in range(len(devices).bit_length())), len(devices)})
    shared = math.lcm(*counts) * -(-case.batch // math.lcm(*counts))
    for scaling in ("weak", "strong"):
        alone = 0.0
        for count in counts:
            batch = case.batch if scaling == "weak" else shared // count
            this = dataclasses.replace(case, batch=batch)
            row: Row = {"what": f"{scaling}, devices: {count}, {this}"}
            try:
                row |= run_case(config, this, devices[:count], runs)
            except jax.errors.JaxRuntimeError as error:
                yield {**row, "result": " ".join(str(error).split())[:200]}
                continue
            alone = alone or row["photos/s"] / count
            yield {**row, "efficiency": f"{row['photos/s'] / count / alone:.0%}"}
