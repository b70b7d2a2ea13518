"""Two processes with two devices each, joined by jax.distributed, equal one with one device."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.training.train_test import ROOT, command, environment, link_cache, losses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SHORT = ("--config.train.duration=3 steps", "--config.train.checkpoint_every=3 steps")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process with one device."""
    shared = tmp_path_factory.mktemp("shared")
    workdir = shared / "alone"
    link_cache(shared, workdir)
    subprocess.run(
        command(shared, workdir, *SHORT),
        cwd=ROOT,
        env=environment(1),
        check=True,
        capture_output=True,
        timeout=600,
    )
    return workdir


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_two_processes_give_the_losses_of_one(alone, parallel):
    shared, together = alone.parent, alone.with_name(parallel)
    link_cache(shared, together)
    flags = (*SHORT, f"--config.train.parallel={parallel}")
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            command(shared, together, *flags, coordinator, "--processes=2", f"--process={number}"),
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    expected, found = losses(alone), losses(together)
    assert sorted(found) == sorted(expected) == [1, 2, 3]
    for step, line in expected.items():
        for name, value in line.items():
            # Differences of rounding grow from step to step.
            assert abs(found[step][name] - value) <= 1e-5 * 10 ** (step - 1) * abs(value), name
    for name in ("metrics.json", "curves.png"):
        assert (together / name).exists()
