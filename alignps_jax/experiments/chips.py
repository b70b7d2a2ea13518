"""The chips that programs are compiled for while they are not here, and topologies of them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from alignps_jax.errors import known_name
from alignps_jax.types import UserError

# By name: GB that a program can have, and the package of the compiler.
CHIPS = {
    "v5e": (16.9, "libtpu"),
    "v6e": (33.6, "libtpu"),
    "v5p": (102.0, "libtpu"),
    "h100": (84.9, "jax_plugins"),
    "a100": (85.1, "jax_plugins"),
    "v100": (16.9, "jax_plugins"),
    "cpu": (math.inf, "jax"),
}
# How a process finds the compilers, but no devices.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}
# XLA's `GpuTargetConfig`: name, capability, cores, float32 units and clock (GHz) of a core, bytes
# of bandwidth, memory, L2 cache, shared memory of a core and of a block.
# fmt: off
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128,
             1.98, 3352320000000, 84942979072, 52428800, 233472, 232448),
    "a100": ("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64,
             1.41, 2039040000000, 85100068864, 41943040, 167936, 166912),
    "v100": ("Tesla V100-SXM2-16GB", "major: 7", 80, 64,
             1.53, 898048000000, 16935682048, 6291456, 98304, 98304),
}
# fmt: on
_TARGET = """
gpu_device_info {{
  name: "{0}" device_vendor: "NVIDIA Corporation" cuda_compute_capability {{ {1} }}
  core_count: {2} fpus_per_core: {3} clock_rate_ghz: {4} memory_bandwidth: {5}
  device_memory_size: {6} ecc_enabled: true l2_cache_size: {7} device_address_bits: 64
  shared_memory_per_core: {8} shared_memory_per_block: 49152 shared_memory_per_block_optin: {9}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{0}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
"""


def parse_topologies(text: str) -> list[str]:
    """The topologies of `--topology`, such as `v5e:2x4,h100:8`.

    Raises:
      UserError: a chip is unknown, what follows is no shape, or its compiler is not installed.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        chip, _, shape = name.partition(":")
        _, package = CHIPS[known_name("--topology", chip, CHIPS)]
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape):
            raise UserError(f"--topology: found {name!r}, expected a shape such as {chip}:2x4")
        if not importlib.util.find_spec(package):
            raise UserError(
                f"--topology: the compiler for {name} is not installed here; make "
                "setup-accelerators, then .venv-aot/bin/python launch.py --mode=scaling ..."
            )
    return names


def devices_of(topology: str) -> list[Any]:
    """The devices to compile for, in a process that has not used JAX yet."""
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    chip, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x")]
    if chip == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(sides))
        return jax.devices()
    options: dict[str, Any] = {"platform": "tpu", "topology_name": topology}
    if chip in _GPUS:
        shape = "x".join(map(str, [1, 1, *sides][-3:]))
        target = _TARGET.format(*_GPUS[chip])
        options = {"platform": "cuda", "target_config": target, "topology": shape}
    return list(topologies.get_topology_desc(**options).devices)
