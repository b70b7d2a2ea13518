"""What the parts of the benchmark are written with: clocks, rows, operation counts, rates.

A part is a function from `Context` to an iterable of `Row`s; `run.PARTS` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that several runs of one function took: median, fastest, slowest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Of the runs' seconds, at least one."""
        seconds = sorted(seconds)
        return cls(statistics.median(seconds), seconds[0], seconds[-1], len(seconds))

    def divided(self, parts: int) -> Timing:
        """Of one of so many equal parts."""
        return Timing(self.median / parts, self.low / parts, self.high / parts, self.runs)


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of the benchmark.

    Attributes:
      part: name of the part, a key of `run.PARTS`.
      name: what was timed; unique within its part.
      time: what it took, in seconds.
      floor: what it takes at least on this machine, in seconds; None if there is no such figure.
      torch: what the same work took in PyTorch, in turns with ours.
      flops: floating-point operations of one run.
      bytes: what one run moves to and from memory (XLA's estimate).
      goal: what the project aims at, in words, with numbers.
      note: anything else worth knowing, in words.
      memory: peak memory of one run in bytes: arguments, results and temporaries.
    """

    part: str
    name: str
    time: Timing
    floor: float | None = None
    torch: Timing | None = None
    flops: float | None = None
    bytes: float | None = None
    goal: str = ""
    note: str = ""
    memory: float | None = None

    @property
    def floor_ratio(self) -> float | None:
        """How many times its floor this took."""
        return None if self.floor is None else self.time.median / self.floor

    @property
    def torch_ratio(self) -> float | None:
        """How many times longer PyTorch took."""
        return None if self.torch is None else self.torch.median / self.time.median

    @property
    def tflops(self) -> float | None:
        """10^12 floating-point operations per second."""
        return None if self.flops is None else self.flops / self.time.median / 1e12


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part may use.

    Attributes:
      config: the configuration, `configs/cuhk.py` unless another was asked for.
      runs: timed runs of every function (the median counts).
      quick: only see that it works: tiny shapes, figures without meaning.
      workdir: where results go; parts may write plots and scratch files there.
      torch: PyTorch, if it and torchvision are installed and run on our kind of device.
      rate: what floors are computed from; ask it right after the timing.
      shared: median seconds of the rows so far, by "part: name", for other parts.
    """

    config: ConfigDict
    runs: int
    quick: bool
    workdir: Path
    torch: ModuleType | None
    rate: FloatRate
    shared: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def torch_device(self) -> str:
        """Where PyTorch's tensors belong, so that both run on the same hardware."""
        return "cpu" if jax.default_backend() == "cpu" else "cuda"

    def finished(self, function: Callable[[], object]) -> Callable[[], object]:
        """A PyTorch function that returns once the device is done, as `time_alternating` asks."""

        def run() -> object:
            result = function()
            if self.torch_device == "cuda":
                self.torch.cuda.synchronize()
            return result

        return run


def time_alternating(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times functions in turns, so that all of them meet the same disturbances.

    Every round runs each of them once; every second round goes backwards, so that none always
    follows the same other one.

    Args:
      functions: by name. A run ends once what it returned is there (JAX computes in the
        background; of PyTorch's functions see `Context.finished`).
      runs: timed rounds, at least one.
      warmup: rounds before them (compilation, caches) that do not count.
      clock: seconds.
    """
    if runs < 1:
        raise ValueError(f"runs: found {runs}, expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, runs):
        names = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in names:
            start = clock()
            jax.block_until_ready(functions[name]())
            elapsed = clock() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: Timing.of(each) for name, each in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA says of a program: operations, bytes moved to and from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


def program_cost(function: Callable[..., Any], *args: Any) -> Cost:
    """What a call costs by XLA's analysis of the program before it is optimised.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s. XLA counts the body of a loop once; here a
    `lax.scan` counts as often as it runs. The rounds of a `lax.while_loop` are known to nobody:
    it counts once. Bytes are an upper bound, as nothing is fused yet.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    return _analyse(jaxpr) + _repetitions(jaxpr.jaxpr)


def _analyse(jaxpr: jex.ClosedJaxpr) -> Cost:
    """XLA's analysis, which counts every loop's body once."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]
    analysis = jax.jit(jex.jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis() or {}
    return Cost(analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0))


def _repetitions(jaxpr: jex.Jaxpr) -> Cost:
    """The cost of all rounds of the scans in it but the first."""
    cost = Cost(0.0, 0.0)
    for equation in jaxpr.eqns:
        for inner in jex.jaxprs_in_params(equation.params):
            rest = _repetitions(inner)
            cost += rest
            if equation.primitive.name == "scan":
                body = equation.params["jaxpr"]
                cost += (_analyse(body) + rest) * (equation.params["length"] - 1)
    return cost


def peak_memory(compiled: jax.stages.Compiled) -> float:
    """Bytes that a compiled program needs at most: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    return float(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


class FloatRate:
    """The better rate of a plain 3x3 convolution and a matrix product on this machine.

    Measured whenever it is asked for, that is, right after what it is compared with: on a shared
    machine it changes from minute to minute.
    """

    def __init__(self, *, runs: int, quick: bool = False):
        self._runs = runs
        on_cpu = jax.default_backend() == "cpu"
        # Side of the square matrices; shape and features of the convolution.
        self._side = 256 if quick else 2048 if on_cpu else 8192
        self._map = (1, 16, 16, 32) if quick else (1 if on_cpu else 8, 113, 188, 256)
        self._programs = functools.cache(self._compile)

    def __call__(self, dtype: str = "float32") -> float:
        """Floating-point operations per second in this type, that of the median run."""
        programs = self._programs(dtype)
        times = time_alternating(
            {name: run for name, (run, _) in programs.items()}, runs=self._runs
        )
        return max(flops / times[name].median for name, (_, flops) in programs.items())

    def floor(self, flops: float, dtype: str = "float32") -> float:
        """Seconds that so many operations take at this rate."""
        return flops / self(dtype)

    def _compile(self, dtype: str) -> dict[str, tuple[Callable[[], object], float]]:
        """The product and the convolution, and their operations."""
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        channels = self._map[-1]
        work = {
            "product": (jnp.matmul, normal(self._side, self._side), normal(self._side, self._side)),
            "convolution": (plain_conv, normal(*self._map), normal(3, 3, channels, channels)),
        }
        return {
            name: (
                functools.partial(jax.jit(function).lower(*args).compile(), *args),
                program_cost(function, *args).flops,
            )
            for name, (function, *args) in work.items()
        }


def plain_conv(inputs: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolution of NHWC with HWIO, padded so that at stride 1 the map keeps its size."""
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
