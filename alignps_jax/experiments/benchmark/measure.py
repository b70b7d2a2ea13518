"""Clocks and rows: how the benchmark times a piece of work and what it says of it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that several runs of one function took: median, fastest, slowest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Summarizes the seconds of at least one run."""
        seconds = sorted(seconds)
        return cls(statistics.median(seconds), seconds[0], seconds[-1], len(seconds))

    def divided(self, parts: float) -> Timing:
        """What one of so many equal parts took."""
        return Timing(self.median / parts, self.low / parts, self.high / parts, self.runs)


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of the benchmark.

    Attributes:
      part: the part that it belongs to.
      name: what was timed; unique within its part.
      time: seconds of one run.
      throughput: how many `unit`s a second takes; None if nothing is counted.
      unit: what is counted.
      memory: peak bytes of one run on one device: arguments, results and temporaries.
      compile: seconds that tracing and compiling took, without a cache.
      note: anything else worth knowing, in words.
    """

    part: str
    name: str
    time: Timing
    throughput: float | None = None
    unit: str = ""
    memory: float | None = None
    compile: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time, which takes `items` of `unit` in one run; else see `Row`."""

    name: str
    run: Callable[[], object]
    items: int
    unit: str
    memory: float | None = None
    compile: float | None = None


def timed(part: str, works: Sequence[Work], *, runs: int) -> Iterator[Row]:
    """Times the works of one part in turns."""
    times = time_in_turns({work.name: work.run for work in works}, runs=runs)
    for work in works:
        time = times[work.name]
        rate = work.items / time.median
        yield Row(part, work.name, time, rate, work.unit, work.memory, work.compile)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times functions in turns, so that all of them meet the same disturbances.

    Every round runs each function once. Every second round goes backwards, so that no function
    always follows the same other one.

    Args:
      functions: by name. A run ends once its result is ready, as JAX computes in the background.
      runs: timed rounds, at least one.
      warmup: rounds before them that do not count (compilation, caches).
      clock: seconds.
    """
    if runs < 1:
        raise ValueError(f"runs: found {runs}, expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, runs):
        for name in list(functions) if turn % 2 == 0 else list(functions)[::-1]:
            start = clock()
            jax.block_until_ready(functions[name]())
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: Timing.of(each) for name, each in seconds.items()}


def compiled(function: Any, *args: Any) -> tuple[jax.stages.Compiled, float]:
    """The program of a jitted or pmapped function for these arguments, and the seconds it took."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def peak_memory(program: jax.stages.Compiled) -> float | None:
    """Bytes that a program needs at most on one device; None where XLA does not say."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    return float(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
