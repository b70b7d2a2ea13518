"""Runs as users start them, in one process or several, and the log that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from alignps_jax.distributed import barrier, join, leave
from alignps_jax.types import UserError
from tests.places import ROOT, free_port, heed_signals

ENDLESS = ("--config.train.duration=4000 steps", "--config.train.checkpoint_every=9999 steps")
Processes = list[subprocess.Popen[str]]


def command(shared: Path, workdir: Path, *flags: str) -> list[str]:
    """Training of configs/tiny.py, unless the flags name another mode."""
    config = ["--config=configs/tiny.py", f"--config.data.root={shared / 'tiny'}"]
    return [sys.executable, "launch.py", *config, f"--workdir={workdir}", *flags]


def environment(devices: int) -> dict[str, str]:
    """That of the tests, with another number of simulated devices."""
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}


def link_cache(shared: Path, workdir: Path) -> None:
    """Makes the workdir's compilation cache a link to the shared one."""
    (shared / "xla_cache").mkdir(exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "xla_cache").exists():
        (workdir / "xla_cache").symlink_to(shared / "xla_cache")


def launch(
    shared: Path, workdir: Path, *flags: str, devices: int = 1, long: bool = False
) -> subprocess.CompletedProcess[str]:
    """A run to its end; a `long` one in code that takes longer to compile and runs faster."""
    link_cache(shared, workdir)
    env = environment(devices)
    if long:
        env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command(shared, workdir, *flags), check=False, **options)


def start(
    shared: Path, workdir: Path, *flags: str, count: int = 2, devices: int = 2, slurm: bool = False
) -> Processes:
    """The processes of one run under way, each with both outputs in one."""
    port, processes = free_port(), []
    for index in range(count):
        own, more = {}, []
        if slurm:  # what srun says of itself; JAX reads it
            more = ["--distributed"]
            own = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
            own |= {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(index)}
            own["JAX_COORDINATOR_PORT"] = str(port)
        elif count > 1:
            more = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        words = command(shared, workdir, *flags, *more)
        processes.append(_started(words, environment(devices) | own, subprocess.STDOUT))
    return processes


def start_pair(module: str, *words: str, devices: int = 4) -> Processes:
    """A test's module twice, as the two processes of one run (`run_one`)."""
    port, env = str(free_port()), environment(devices)
    run = [sys.executable, "-m", module]
    return [_started([*run, str(index), port, *words], env, None) for index in range(2)]


def _started(words: list[str], env: dict[str, str], errors: int | None) -> subprocess.Popen[str]:
    output = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=env, preexec_fn=heed_signals, **output)


def run_one(child: Callable[..., int]) -> None:
    """What a module does as one of a pair; `child` gets its number and the words."""
    index, port, *words = sys.argv[1:]
    join(f"127.0.0.1:{port}", 2, int(index))
    try:
        code = child(int(index), *words)
        barrier("end")
    except UserError as error:
        print(f"error: {error}")
        code = error.exit_code
    leave(code)


def finish(processes: Processes, code: int = 0) -> list[str]:
    """The outputs of processes that end with this exit code."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == code, output
    return outputs


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Every training line of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "data_wait")
    return {
        line["step"]: {name: x for name, x in line.items() if name not in clock}
        for line in lines
        if "loss" in line
    }


def await_steps(workdir: Path, processes: Processes) -> None:
    """Returns once a run has logged three steps."""
    while not (workdir / "log.jsonl").exists() or len(losses(workdir)) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
