"""The chips that programs are compiled for, and the topologies (`--topology`) that they form."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from alignps_jax.errors import known_name
from alignps_jax.types import UserError

_GIB = 2.0**30
_INSTALL = "make setup-accelerators, then .venv-aot/bin/python launch.py --mode=scaling ..."
# How a child process finds the compilers but no devices.
_TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_GPU_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """What XLA must know of a GPU to compile for it (its `GpuTargetConfig`), in bytes and Hz."""

    name: str
    capability: str
    cores: int
    lanes: int  # float32 units of a core
    bandwidth: int
    l2_cache: int
    clock_ghz: float
    memory: int
    shared_memory: int  # of a core
    shared_memory_of_block: int

    def text(self) -> str:
        """The protobuf text; threads and registers are the same on all of these."""
        return f"""
gpu_device_info {{
  name: "{self.name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {self.capability} }}
  core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory} ecc_enabled: true
  l2_cache_size: {self.l2_cache} device_address_bits: 64
  shared_memory_per_core: {self.shared_memory} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_of_block}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
device_description_str: "{self.name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's properties, from the data sheets of its maker.

    Attributes:
      platform: tpu, cuda or cpu.
      memory: bytes that a program can have; None if it is not known.
      peak: floating point operations a second, by how products are computed: bfloat16, or float32
        `default` (TF32 on an A100 or H100) or `highest`. A TPU's compiler knows better.
      bandwidth: bytes a second of the memory.
      link: bytes a second to the other chips, in one direction.
      clock: cycles a second, where the compiler estimates cycles and the clock is known.
      dimensions: numbers in the name of a TPU's topology.
      target: what the compiler must know of a GPU.
    """

    platform: str
    memory: float | None = None
    peak: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bandwidth: float | None = None
    link: float | None = None
    clock: float | None = None
    dimensions: int = 2
    target: GpuTarget | None = None


def _gpu(exact: float, fast: float, bfloat16: float, link: float, target: GpuTarget) -> Chip:
    peak = {"float32 highest": exact, "float32 default": fast, "bfloat16": bfloat16}
    return Chip("cuda", target.memory, peak, target.bandwidth, link, target=target)


def _tpu(memory: float, clock: float | None, dimensions: int = 2) -> Chip:
    return Chip("tpu", memory * _GIB, clock=clock, dimensions=dimensions)


# fmt: off
CHIPS: dict[str, Chip] = {
    "v5e": _tpu(15.75, 1.5e9),
    "v6e": _tpu(31.25, None),
    "v5p": _tpu(95.0, 1.75e9, dimensions=3),
    "h100": _gpu(66.9e12, 494.7e12, 989.4e12, 450e9, GpuTarget(
        "NVIDIA H100 80GB HBM3", "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128,
        3352320000000, 52428800, 1.98, 84942979072, 233472, 232448)),
    "a100": _gpu(19.5e12, 156e12, 312e12, 300e9, GpuTarget(
        "NVIDIA A100-SXM4-80GB", "major: 8", 108, 64,
        2039040000000, 41943040, 1.41, 85100068864, 167936, 166912)),
    "v100": _gpu(15.7e12, 15.7e12, 15.7e12, 150e9, GpuTarget(  # knows neither of the others
        "Tesla V100-SXM2-16GB", "major: 7", 80, 64,
        898048000000, 6291456, 1.53, 16935682048, 98304, 98304)),
    "cpu": Chip("cpu"),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips of one kind, such as `v5e:2x4`, `h100:8` or `h100:32x8` (hosts x GPUs)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many chips there are."""
        return math.prod(self.shape)

    def environment(self) -> dict[str, str]:
        """What a process that compiles for it needs beside today's environment."""
        match self.chip.platform:
            case "tpu":
                return _TPU_ENVIRONMENT
            case "cuda":
                tools = os.pathsep.join([*_cuda_tools(), os.environ.get("PATH", "")])
                return {**_GPU_ENVIRONMENT, "PATH": tools}
        flags = os.environ.get("XLA_FLAGS", "")
        devices = f"--xla_force_host_platform_device_count={self.count}"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {devices}".strip()}

    def devices(self) -> list[Any]:
        """The devices to compile for, in a process with this environment."""
        shape = "x".join(map(str, self.shape))
        match self.chip.platform:
            case "tpu":
                single = {"chips_per_host_bounds": [1, 1, 1]} if self.count == 1 else {}
                name = f"{self.name.partition(':')[0]}:{shape}"
                return list(topologies.get_topology_desc(name, platform="tpu", **single).devices)
            case "cuda":
                assert self.chip.target is not None
                shape = "x".join(map(str, (*(1, 1), *self.shape)[-3:]))
                found = topologies.get_topology_desc(
                    platform="cuda", target_config=self.chip.target.text(), topology=shape
                )
                return list(found.devices)
        return jax.devices()[: self.count]


def parse_topologies(text: str) -> list[Topology]:
    """The topologies of `--topology`, each once.

    Raises:
      UserError: a chip is unknown, a shape is none, or a compiler is not installed.
    """
    return [_topology(name.strip()) for name in dict.fromkeys(text.split(","))]


def _topology(name: str) -> Topology:
    chip_name, _, shape_text = name.partition(":")
    chip = CHIPS[known_name("--topology", chip_name, CHIPS)]
    most = {"tpu": chip.dimensions, "cuda": 2, "cpu": 1}[chip.platform]
    least = chip.dimensions if chip.platform == "tpu" else 1
    shape = tuple(map(int, re.findall(r"\d+", shape_text)))
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape_text) or not (
        least <= len(shape) <= most
    ):
        examples = {"tpu": "2x4" if most == 2 else "2x2x1", "cuda": "8 or 4x8", "cpu": "8"}
        expected = f"{chip_name}: and its shape, such as {chip_name}:{examples[chip.platform]}"
        raise UserError(f"--topology: found {name!r}, expected {expected}")
    if not _installed(chip.platform):
        raise UserError(f"--topology: the compiler for {name} is not installed here; {_INSTALL}")
    return Topology(name, chip, shape)


def _installed(platform: str) -> bool:
    if platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    plugins = importlib.util.find_spec("jax_plugins")
    folders = [Path(each) for each in (plugins.submodule_search_locations or ())] if plugins else []
    return platform == "cpu" or any(list(folder.glob("xla_cuda*")) for folder in folders)


def _cuda_tools() -> list[str]:
    """Folders of ptxas as the packages of NVIDIA install it."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (spec.submodule_search_locations or ())] if spec else []
    return [str(path.parent) for folder in folders for path in sorted(folder.glob("*/bin/ptxas"))]
