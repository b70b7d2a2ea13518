"""Several processes save together: where one cannot, none waits for the others."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from alignps_jax import peers
from alignps_jax.checkpoint.store import Checkpoints, load_arrays
from alignps_jax.types import OIMMemory, TrainState, UserError
from configs import tiny
from tests.places import ROOT, free_port

BEAT = 10  # seconds, the shortest that JAX takes


def state(step: int) -> TrainState:
    memory = OIMMemory(np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(step))
    params = {"w": np.full((1000, 10), step, np.float32)}
    return TrainState(np.int32(step), params, {}, (), memory)


def child(index: int, workdir: Path, limited: int) -> int:
    """Saves 1, then 2, for which process `limited` has no room."""
    try:
        with Checkpoints(workdir, keep=2, config=tiny.get_config().lock()) as checkpoints:
            checkpoints.save(state(1), {"position": 1}, score=0.5)
            checkpoints.wait()
            if index == limited:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            checkpoints.save(state(2), {"position": 2})
            checkpoints.wait()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_is_full_for_one_ends_all_with_a_line_each(tmp_path, limited):
    port, begun = str(free_port()), time.monotonic()
    words = [sys.executable, "-m", "tests.checkpoint.several_test", str(tmp_path), str(limited)]
    processes = [
        subprocess.Popen(
            [*words, str(index), port],
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        texts = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes[limited] == UserError.exit_code, texts
    assert texts[limited][1].splitlines() == [
        f"error: {tmp_path}/checkpoints: cannot be written (File too large); complete checkpoints "
        "stay, and the same command resumes from the last one"
    ]
    assert codes[1 - limited] == peers.LOST_PEER, texts
    (line,) = texts[1 - limited][1].splitlines()
    assert line.startswith(f"error: process {limited} of the run ended or does not answer")
    assert time.monotonic() - begun < 120
    assert int(load_arrays(tmp_path, lambda name: name == "step")["step"]) == 1


if __name__ == "__main__":
    workdir, limited, index, port = sys.argv[1:]
    peers.join(f"127.0.0.1:{port}", 2, int(index), heartbeat=BEAT)
    sys.exit(peers.end_together(lambda: child(int(index), Path(workdir), int(limited))))
