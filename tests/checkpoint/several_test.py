"""Several processes save together: where one cannot, none waits for the others."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest

from alignps_jax import distributed
from alignps_jax.checkpoint.store import Checkpoints, load_arrays
from alignps_jax.types import OIMMemory, TrainState
from configs import tiny
from tests.runs import run_one, start_pair


def state(step: int) -> TrainState:
    memory = OIMMemory(np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(step))
    params = {"w": np.full((1000, 10), step, np.float32)}
    return TrainState(np.int32(step), params, {}, (), memory)


def child(index: int, workdir: str, limited: str) -> int:
    """Saves 1, then 2, for which process `limited` has no room."""
    with Checkpoints(Path(workdir), keep=2, config=tiny.get_config().lock()) as checkpoints:
        checkpoints.save(state(1), {"position": 1}, score=0.5)
        checkpoints.wait()
        if index == int(limited):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        checkpoints.save(state(2), {"position": 2})
        checkpoints.wait()
    return 0


@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_is_full_for_one_ends_all(tmp_path, limited):
    begun = time.monotonic()
    pair = start_pair(__name__, str(tmp_path), str(limited), devices=1)
    texts = [process.communicate(timeout=150)[0] for process in pair]
    assert all(process.returncode != 0 for process in pair), texts
    assert texts[limited].splitlines()[-1] == (
        f"error: {tmp_path}/checkpoints: cannot be written (File too large); complete checkpoints "
        "stay, and the same command resumes from the last one"
    )
    assert time.monotonic() - begun < 120
    assert int(load_arrays(tmp_path, lambda name: name == "step")["step"]) == 1


if __name__ == "__main__":
    distributed._GOODBYE = 5
    run_one(child)
