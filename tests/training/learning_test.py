"""Training in both types learns, and bfloat16 gets as far; what stays float32 with it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.devices import AXIS
from configs import tiny
from tests.fakes import random_batch, train_setup
from tests.training.train_test import launch, losses


def test_losses_memory_statistics_and_parameters_stay_float32():
    config = tiny.get_config()
    config.model.dtype = "bfloat16"
    _, step, state = train_setup(config, devices=1)
    batch = jax.tree.map(lambda x: x[None], random_batch(np.random.default_rng(0)))
    after, metrics = jax.eval_shape(jax.vmap(step, in_axes=(None, 0), axis_name=AXIS), state, batch)
    floats = [x for x in jax.tree.leaves((after, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The tiny training in both types: same data, same start."""
    shared = tmp_path_factory.mktemp("shared")
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = shared / dtype
        done = launch(
            shared,
            folders[dtype],
            f"--config.model.dtype={dtype}",
            "--config.train.duration=200 steps",
            "--config.optimizer.drops=('170 steps',)",
            "--config.train.checkpoint_every=200 steps",
            "--config.eval.score_threshold=0.05",
            long=True,
        )
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(runs, dtype):
    """A few hundred steps on few scenes: detections and losses must clearly get better."""
    log = losses(runs[dtype])
    first, last = (
        np.mean([log[step]["loss/cls"] + log[step]["loss/box"] for step in steps])
        for steps in (range(5, 25), range(180, 201))
    )
    assert last < 0.6 * first
    oim = [np.mean([log[step]["loss/oim"] for step in s]) for s in (range(20, 60), range(180, 201))]
    assert oim[1] < 0.3 * oim[0]


def test_it_learns_as_well_as_float32(runs):
    ends = {}
    for dtype, folder in runs.items():
        log = losses(folder)
        ends[dtype] = np.mean([log[step]["loss"] for step in range(180, 201)])
    # The two runs part within a few steps: what is compared is how far they get.
    assert ends["bfloat16"] < 1.05 * ends["float32"]


def test_it_detects_as_well_as_float32(runs):
    recall = {
        dtype: json.loads((folder / "metrics.json").read_text())["detection"]["recall"]
        for dtype, folder in runs.items()
    }
    assert recall["bfloat16"] >= recall["float32"] - 0.1
