"""How steps scale over the devices that are here: weak and strong, with a plot."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from alignps_jax.devices import Devices, replicate, split_over_devices, sum_over_devices
from alignps_jax.experiments.benchmark.measure import compiled, peak_memory, time_in_turns
from alignps_jax.experiments.benchmark.report import machine_line, seconds, size, three_digits
from alignps_jax.experiments.benchmark.simulate import made_up_split
from alignps_jax.experiments.scaling.cases import (
    ARITHMETIC,
    PEOPLE,
    Case,
    Prepared,
    how_computed,
    prepare,
    products_of,
    usable,
)
from alignps_jax.experiments.scaling.program import work_of
from alignps_jax.experiments.scaling.table import Table
from alignps_jax.files import complete_file
from data_pipeline.pipeline import make_train_pipeline

SIMULATED = (
    "These are simulated CPU devices, which share the cores of one machine: only counts and bytes "
    "mean something, times and efficiency do not."
)
_PHOTOS = 8  # different ones, which batches repeat


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step on some devices.

    Attributes:
      rate: images a second over all devices, waiting for data included.
      data_wait: share of the time in which the step waits for its batch.
      memory: peak bytes that the program needs on a device, by the compiler's account.
      collective_bytes: bytes that arrive at a device in a step.
      collective_seconds: how long a sum of so many bytes over the devices takes by itself.
    """

    compile_seconds: float
    rate: float
    data_wait: float
    memory: float
    collective_bytes: float
    collective_seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement as weak or as strong scaling; `efficiency` is against one device.

    `dtype` says how the step computes (`cases.how_computed`).
    """

    step: str
    size: tuple[int, int]
    dtype: str
    scaling: str
    devices: int
    batch: int
    origin: str
    problem: str = ""
    measured: Measured | None = None
    efficiency: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured: a later row of the same replaces this one."""
        return self.step, self.size, self.dtype, self.scaling, self.devices, self.batch


def device_counts(total: int) -> list[int]:
    """1, 2, 4, ... and all devices."""
    return sorted({*(2**power for power in range(total.bit_length())), total})


def scalings(batch: int, counts: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """Pairs of devices and images of each; strong scaling shares at least `batch` images."""
    shared = math.lcm(*counts)
    shared *= -(-batch // shared)
    return {
        "weak": [(count, batch) for count in counts],
        "strong": [(count, shared // count) for count in counts],
    }


def measure_scaling(
    config: ConfigDict, steps: Sequence[Case], target: Path, *, runs: int, devices: Devices
) -> None:
    """Measures every step on 1, 2, 4, ... all devices; prints rows, and keeps them in `target`.

    What does not fit into memory is a row as well.

    Raises:
      UserError: `target` holds something else, or cannot be written.
    """
    config = usable(config)
    simulated = devices[0].platform == "cpu" and len(devices) > 1
    origin = f"{machine_line()}.{f' {SIMULATED}' if simulated else ''}"
    print(origin, flush=True)
    table = Table(target, _row_of, _COLUMNS)
    for case in steps:
        for row in _rows(config, case, devices, runs, origin):
            table.add(row)
    plot = target.with_suffix(".png")
    with complete_file(plot) as temporary:
        scaling_plot(table.rows.values()).savefig(temporary, format="png")
    table.say_where()
    print(f"plot        {plot}")


def _rows(
    config: ConfigDict, case: Case, devices: Devices, runs: int, origin: str
) -> Iterator[Row]:
    """Weak and strong scaling of one step, one measurement after the other."""
    known: dict[tuple[int, int], dict[str, Any]] = {}
    products = products_of(*ARITHMETIC[case.step](config))
    how = how_computed(case.step, products, remat=config.model.remat)
    for scaling, pairs in scalings(case.batch, device_counts(len(devices))).items():
        alone = 0.0
        for count, batch in pairs:
            if (count, batch) not in known:
                this = dataclasses.replace(case, batch=batch)
                known[count, batch] = _try(config, this, devices[:count], runs)
            row = Row(
                step=case.step,
                size=case.size,
                dtype=how,
                scaling=scaling,
                devices=count,
                batch=batch,
                origin=origin,
                **known[count, batch],
            )
            if row.measured:
                alone = row.measured.rate if count == 1 else alone
                efficiency = row.measured.rate / (count * alone) if alone else None
                row = dataclasses.replace(row, efficiency=efficiency)
            yield row


def _row_of(measured: dict[str, Any] | None = None, **fields: Any) -> Row:
    """A row as a file holds it."""
    return Row(measured=Measured(**measured) if measured else None, **fields)


def _try(config: ConfigDict, case: Case, devices: Devices, runs: int) -> dict[str, Any]:
    """What was measured, or the problem of doing so, as fields of a row."""
    try:
        return {"measured": measure(config, case, devices, runs=runs)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"problem": f"does not fit: {str(error).splitlines()[0][:160]}"}


def measure(config: ConfigDict, case: Case, devices: Devices, *, runs: int) -> Measured:
    """Runs a step on these devices, with batches that are decoded as in training."""
    step = prepare(config, case, devices)
    program, compile_seconds = compiled(step.function, *step.shapes)
    batches = _batches(config, case, len(devices), runs + 1)
    taken, waited = _timed_runs(step, program, batches, devices)
    arriving = 0.0
    if len(devices) > 1:  # one device sends nothing, whatever the program says
        arriving = float(sum(work_of(program.as_text() or "").collectives.values()))
    return Measured(
        compile_seconds=compile_seconds,
        rate=runs * case.batch * len(devices) / taken,
        data_wait=waited / taken,
        memory=peak_memory(program) or 0.0,
        collective_bytes=arriving,
        collective_seconds=_sum_seconds(arriving, devices, runs),
    )


def _batches(config: ConfigDict, case: Case, devices: int, count: int) -> grain.DatasetIterator:
    height, width = case.size
    data = config.data.copy_and_resolve_references()
    data.train_scales = ((max(case.size), min(case.size)),)
    split = made_up_split(_PHOTOS, (height, width), people=PEOPLE)
    pipeline = make_train_pipeline(split, data, seed=0, batch_size=case.batch * devices)
    return pipeline.iterator(count)


def _timed_runs(
    step: Prepared, program: Any, batches: Iterable[Any], devices: Devices
) -> tuple[float, float]:
    """Seconds that all runs but the first take, and the part of them spent on waiting for data."""
    # Donation takes the buffers, so no two leaves may share one.
    arguments = replicate(jax.tree.map(jnp.copy, step.initial()), devices)
    waited, start, asked = 0.0, 0.0, time.perf_counter()
    for turn, batch in enumerate(batches):
        waited += time.perf_counter() - asked
        result = program(*arguments, split_over_devices(batch, len(devices)))
        arguments = step.following(arguments, jax.block_until_ready(result))
        asked = time.perf_counter()
        if turn == 0:
            waited, start = 0.0, asked
    return asked - start, waited


def _sum_seconds(arriving: float, devices: Devices, runs: int) -> float:
    """How long it takes to add up float32 arrays of so many bytes over the devices."""
    if not arriving:
        return 0.0
    add = sum_over_devices(devices)
    arrays = jax.block_until_ready(add(np.zeros((len(devices), int(arriving) // 4), np.float32)))
    return time_in_turns({"sum": lambda: add(arrays)}, runs=runs)["sum"].median


def scaling_plot(rows: Collection[Row]) -> Figure:
    """Images a second against devices, a panel per step; dotted, what no loss would be."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.measured:
            panel = curves.setdefault(f"{row.step} {row.size[1]}×{row.size[0]}, {row.dtype}", {})
            points = panel.setdefault(row.scaling, [])
            points.append((row.devices, row.measured.rate))
    figure = Figure(figsize=(6 * max(len(curves), 1), 5), dpi=110, layout="constrained")
    for place, (title, panel) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), place)
        for color, (scaling, points) in enumerate(panel.items()):
            counts, rates = zip(*sorted(points), strict=True)
            axes.plot(counts, rates, marker="o", color=f"C{color}", label=scaling)
            ideal = [rates[0] / counts[0] * count for count in counts]
            axes.plot(counts, ideal, ":", color=f"C{color}")
        axes.set(title=title, xlabel="devices", ylabel="images/s", xscale="log", yscale="log")
        axes.set_xticks(counts, map(str, counts))
        for setter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            setter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    if any(row.origin.endswith(SIMULATED) for row in rows):
        figure.suptitle("simulated CPU devices: times mean nothing")
    return figure


def _if_measured(column: Any) -> Any:
    return lambda row: column(row.measured) if row.measured else ""


_COLUMNS = {
    "step": lambda row: f"{row.step} {row.size[1]}×{row.size[0]} {row.dtype}",
    "scaling": lambda row: row.scaling,
    "devices": lambda row: str(row.devices),
    "batch": lambda row: str(row.batch),
    "problem": lambda row: row.problem,
    "throughput": _if_measured(lambda it: f"{three_digits(it.rate)} images/s"),
    "efficiency": lambda row: "" if row.efficiency is None else f"{row.efficiency:.0%}",
    "data wait": _if_measured(lambda it: f"{it.data_wait:.1%}"),
    "memory": _if_measured(lambda it: size(it.memory)),
    "collectives": _if_measured(
        lambda it: (
            f"{size(it.collective_bytes)} in {seconds(it.collective_seconds)}"
            if it.collective_bytes
            else ""
        )
    ),
    "compile": _if_measured(lambda it: seconds(it.compile_seconds)),
}
