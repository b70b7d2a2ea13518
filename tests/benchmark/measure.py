"""What the comparisons are written with: floors, PyTorch, operation counts.

A part is a function from `Context` to an iterable of `Row`s; `__main__.PARTS` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from alignps_jax.experiments.benchmark import measure, parts, report
from alignps_jax.experiments.benchmark.measure import Timing, time_in_turns


@dataclasses.dataclass(frozen=True)
class Row(measure.Row):
    """A figure and what it is compared with.

    Attributes:
      floor: what it takes at least on this machine, in seconds; None if there is no such figure.
      torch: what the same work took in PyTorch, in turns with ours.
      flops: floating-point operations of one run.
      bytes: what one run moves to and from memory (XLA's estimate).
      goal: what the project aims at, in words, with numbers.
    """

    floor: float | None = None
    torch: Timing | None = None
    flops: float | None = None
    bytes: float | None = None
    goal: str = ""

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


def _written(write: Callable[[Any], str], get: Callable[[Row], Any]) -> Callable[[Row], str]:
    """A cell that is empty where there is nothing to write."""
    return lambda row: "" if get(row) is None else write(get(row))


def _ratio(value: float) -> str:
    return f"{report.three_digits(value)}x"


COLUMNS: report.Columns = {
    "time": report.COLUMNS["time"],
    "range": report.COLUMNS["range"],
    "floor": _written(report.seconds, lambda row: row.floor),
    "times floor": _written(_ratio, lambda row: row.floor_ratio),
    "PyTorch": _written(lambda time: report.seconds(time.median), lambda row: row.torch),
    "PyTorch / ours": _written(_ratio, lambda row: row.torch_ratio),
    "TFLOP/s": _written("{:.3f}".format, lambda row: row.tflops),
    "bytes": _written(report.size, lambda row: row.bytes),
    "memory": report.COLUMNS["memory"],
    "goal": lambda row: row.goal,
    "note": report.COLUMNS["note"],
}


@dataclasses.dataclass(frozen=True)
class Context(parts.Context):
    """What a part may use.

    Attributes:
      workdir: where results go; parts may write plots and scratch files there.
      torch: PyTorch, if it and torchvision are installed and run on our kind of device.
      rate: what floors are computed from; ask it right after the timing.
      step_seconds: of the training steps so far, by title, for other parts.
      against: another checkout to compare starts with.
    """

    workdir: Path
    torch: ModuleType | None
    rate: FloatRate
    step_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    against: Path | None = None

    @property
    def torch_note(self) -> str:
        """Why there are no figures of PyTorch, or ""."""
        return "torch: not installed" if self.torch is None else ""

    @property
    def torch_device(self) -> str:
        """Where PyTorch's tensors belong, so that both run on the same hardware."""
        return "cpu" if jax.default_backend() == "cpu" else "cuda"

    def finished(self, function: Callable[[], object]) -> Callable[[], object]:
        """A PyTorch function that returns once the device is done, as `time_in_turns` asks."""

        def run() -> object:
            result = function()
            if self.torch_device == "cuda":
                self.torch.cuda.synchronize()
            return result

        return run


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
    """What a call costs by XLA's analysis of the program before it is optimized.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s. XLA counts the body of a loop once; here a
    `lax.scan` counts as often as it runs. The rounds of a `lax.while_loop` are known to nobody:
    it counts once. Bytes are an upper bound, as nothing is fused yet.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    return _analyze(jaxpr) + _repetitions(jaxpr.jaxpr)


def _analyze(jaxpr: jex.ClosedJaxpr) -> Cost:
    """XLA's analysis, which counts every loop's body once."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]
    analysis = jax.jit(jex.jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis() or {}
    return Cost(analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0))


def _repetitions(jaxpr: jex.Jaxpr) -> Cost:
    """The cost of all rounds of the scans in it but the first."""
    cost = Cost(0.0, 0.0)
    for equation in jaxpr.eqns:
        for inner in jex.jaxprs_in_params(_of_this_platform(equation.params)):
            rest = _repetitions(inner)
            cost += rest
            if equation.primitive.name == "scan":
                body = equation.params["jaxpr"]
                cost += (_analyze(body) + rest) * (equation.params["length"] - 1)
    return cost


def _of_this_platform(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the branches that `lax.platform_dependent` keeps for other platforms."""
    platforms = params.get("branches_platforms")
    if platforms is None:
        return params
    here = jax.default_backend()
    own = next(i for i, names in enumerate(platforms) if names is None or here in names)
    return {**params, "branches": params["branches"][own : own + 1]}


class FloatRate:
    """The better rate of a plain 3x3 convolution and a matrix product on this machine.

    Measured whenever it is asked for, that is, right after what it is compared with: on a shared
    machine it changes from minute to minute.
    """

    def __init__(
        self,
        *,
        runs: int,
        quick: bool = False,
        timer: Callable[..., Mapping[str, Timing]] = time_in_turns,
    ):
        self._runs, self._timer = runs, timer
        on_cpu = jax.default_backend() == "cpu"
        # Side of the square matrices; shape and features of the convolution.
        self._side = 256 if quick else 2048 if on_cpu else 8192
        self._map = (1, 16, 16, 32) if quick else (1 if on_cpu else 8, 113, 188, 256)
        self._programs = functools.cache(self._compile)

    def __call__(self, dtype: str = "float32") -> float:
        """Floating-point operations per second in this type, that of the median run."""
        programs = self._programs(dtype)
        times = self._timer({name: run for name, (run, _) in programs.items()}, runs=self._runs)
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
