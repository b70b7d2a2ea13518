"""Two processes with two devices each, joined by jax.distributed, equal one with one device."""

from __future__ import annotations

import socket
import subprocess

from tests.training.train_test import ROOT, command, environment, link_cache, losses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_losses_of_one(tmp_path):
    short = ("--config.train.duration=3 steps", "--config.train.checkpoint_every=3 steps")
    alone = tmp_path / "alone"
    link_cache(tmp_path, alone)
    subprocess.run(
        command(tmp_path, alone, *short),
        cwd=ROOT,
        env=environment(1),
        check=True,
        capture_output=True,
        timeout=600,
    )
    together = tmp_path / "together"
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            command(
                tmp_path, together, *short, coordinator, "--processes=2", f"--process={number}"
            ),
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
