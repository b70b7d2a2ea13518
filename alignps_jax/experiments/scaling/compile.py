"""Compiles one step for one topology, in a process of its own: a compiler may abort.

    python -m alignps_jax.experiments.scaling.compile < request > answer

The request is a pickled `Request` of `gate.py`; the answer is the last line, a JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark.measure import peak_memory
from alignps_jax.experiments.scaling.arithmetic import products
from alignps_jax.experiments.scaling.cases import Case, prepare
from alignps_jax.experiments.scaling.chips import Topology
from alignps_jax.experiments.scaling.program import work_of
from alignps_jax.nn.platforms import for_every_platform


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile; `config` is a configuration as a dictionary."""

    config: dict[str, Any]
    topology: Topology
    case: Case


def compile_step(request: Request) -> dict[str, Any]:
    """The measured columns of a row of the gate's table."""
    chip = request.topology.chip
    devices = request.topology.devices()
    step = prepare(ConfigDict(request.config), request.case, devices)
    start = time.perf_counter()
    with for_every_platform():
        flops = products(jax.make_jaxpr(step.function)(*step.shapes).jaxpr)
        lowered = step.function.lower(*step.shapes)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    text = program.as_text() or ""
    cheap, dear = work_of(text), work_of(text, max)
    cycles = chip.platform == "tpu"
    analysis = program.memory_analysis()
    return {
        "devices": len(devices),
        "trace_seconds": traced - start,
        "compile_seconds": compiled - traced,
        "peak_memory": getattr(analysis, "peak_memory_in_bytes", 0) or peak_memory(program),
        "code": getattr(analysis, "generated_code_size_in_bytes", 0),
        "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "flops": flops,
        "kernels": dear.kernels,
        "bytes": _plain(cheap.bytes),
        "collectives": _plain(cheap.collectives),
        "collective_counts": _plain(cheap.collective_counts),
        "cycles": _plain(cheap.cycles) if cycles else {},
        "most_cycles": sum(dear.cycles.values()) if cycles else 0.0,
    }


def _plain(sums: Mapping[str, float]) -> dict[str, float]:
    """The largest first, without those of nothing."""
    return {kind: sums[kind] for kind in sorted(sums, key=lambda x: -sums[x]) if sums[kind]}


def main() -> None:
    """Reads a request and writes the answer; what the compiler refuses is an answer too."""
    request: Request = pickle.load(sys.stdin.buffer)
    try:
        answer = compile_step(request)
    except jax.errors.JaxRuntimeError as error:
        answer = {"problem": str(error)}
    print(f"\n{json.dumps(answer)}")


if __name__ == "__main__":
    main()
