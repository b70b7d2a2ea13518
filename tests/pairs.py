"""Starts a test's module twice, as the two processes of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from alignps_jax.distributed import barrier, join, leave
from alignps_jax.types import UserError
from tests.places import ROOT, free_port

COUNT = 2


def start_pair(
    module: str, *words: str, devices: int = 4, started: int | None = None
) -> list[subprocess.Popen[str]]:
    """Starts both, or the first ones, each with this number of simulated devices."""
    port, flag = str(free_port()), f" --xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(index), port, *words],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"] + flag},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(COUNT if started is None else started)
    ]


def outputs_of(pair: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What they say until they end, both with this exit code."""
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [code] * COUNT, outputs
    return outputs


def run_one(child: Callable[..., int]) -> None:
    """What a module does as one of the two; `child` gets the number and the words."""
    index, port, *words = sys.argv[1:]
    join(f"127.0.0.1:{port}", COUNT, int(index))
    try:
        code = child(int(index), *words)
        barrier("end")
    except UserError as error:
        print(f"error: {error}")
        code = error.exit_code
    leave(code)
