"""Processes on this machine that run as those of a cluster do."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.places import ROOT, free_port, heed_signals
from tests.training.train_test import command, environment

# Flags and environment variables of one of so many processes, given its number and a port.
Joining = Callable[[int, int, int], tuple[list[str], dict[str, str]]]


def flags_of(index: int, count: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The three flags, as one types them where nothing manages the machines."""
    flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
    return flags, {}


def slurm(index: int, count: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What srun says of itself; JAX reads it."""
    return ["--distributed"], {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def start(
    shared: Path,
    workdir: Path,
    *flags: str,
    count: int = 2,
    devices: int = 2,
    joining: Joining = flags_of,
) -> list[subprocess.Popen[str]]:
    """Starts `count` processes of `devices` simulated devices each, with configs/tiny.py."""
    port = free_port()
    processes = []
    for index in range(count):
        more, own = joining(index, count, port)
        processes.append(
            subprocess.Popen(
                command(shared, workdir, *flags, *more),
                cwd=ROOT,
                env=environment(devices) | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=heed_signals,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """The outputs of processes that end with this exit code."""
    outputs = [process.communicate(timeout=1800)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == code, output
    return outputs
