"""A run that is stopped anywhere and resumed leaves the log and the scores of one that is not.

The loop is the real one, with a network of one number; every place where a run can be stopped is
tried, by an exception that nothing handles.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alignps_jax.checkpoint.store import Checkpoints, load_arrays
from alignps_jax.devices import AXIS
from alignps_jax.log import MetricLog
from alignps_jax.training.setup import Plan, Run, check_changes, restore
from alignps_jax.training.step import StepMetrics
from alignps_jax.training.train import train
from alignps_jax.types import OIMMemory, TrainState, UserError
from configs import tiny
from tests.data_pipeline.pipeline_test import make_split, mixed_sizes
from tests.data_pipeline.pipeline_test import train as train_pipeline

PLAN = Plan(total=11, checkpoint_every=3, eval_every=4, log_every=1)
# mAP by step: the best is neither the first nor the last.
SCORES = {4: 0.5, 8: 0.75, 11: 0.25}


class Killed(BaseException):
    """The moment at which a run ends."""


def step(state: TrainState, batch) -> tuple[TrainState, StepMetrics]:
    """Adds up the pixels, so that a batch that is left out or seen twice would show."""
    total = lax.psum(jnp.sum(batch.image.astype(jnp.float32)), AXIS) / 1e6
    weight = state.params["w"] * 0.9 + total
    number = jnp.float32(1)
    metrics = StepMetrics({"cls": weight}, number, number, number)
    return state.replace(step=state.step + 1, params={"w": weight}), metrics


def initial() -> TrainState:
    memory = OIMMemory(jnp.ones((3, 2)), jnp.ones((2, 2)), jnp.int32(0))
    return TrainState(jnp.int32(0), {"w": jnp.float32(0)}, {}, (), memory)


class Evaluator:
    """Measures `SCORES`; stops the run where it is told to."""

    def __init__(self, stop: str):
        self._stop = stop

    def _moment(self, name: str) -> None:
        if self._stop == name:
            raise Killed

    def measure(self, params, frozen, step):
        self._moment(f"measuring {step}")
        score = SCORES.get(step, 0.0)
        return types.SimpleNamespace(step=step, score=score, w=float(params["w"]))

    def log(self, measured, log):
        step = measured.step
        self._moment(f"before the line of {step}")
        log.scalars(step, {"eval/all/mAP": SCORES[step], "eval/w": measured.w})
        self._moment(f"after the line of {step}")


@pytest.fixture(scope="module")
def pipeline():
    return train_pipeline(make_split(mixed_sizes(11, 6)), batch_size=4)


def make_run(pipeline, stop: str = "", create: Callable[[], TrainState] = initial) -> Run:
    """A run that stops at the moment `stop`."""
    return Run(pipeline, PLAN, lambda step: 0.1, step, *[Evaluator(stop)] * 2, create)


def go(run: Run, workdir: Path) -> None:
    """Trains until the run ends or stops."""
    with (
        Checkpoints(workdir, keep=2, config=tiny.get_config()) as checkpoints,
        MetricLog(workdir) as log,
    ):
        batches = run.pipeline.iterator(run.plan.total)
        state = restore(run.create, batches, checkpoints) or run.create()
        train(run, state, batches, checkpoints, log)


def results(workdir: Path) -> tuple[list[dict], dict[int, float | None], int]:
    """The log without what depends on the clock, the checkpoints with scores, the chosen one."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("images_per_second", "data_wait"):
            line.pop(name, None)
    scores = {}
    for folder in (workdir / "checkpoints").iterdir():
        file = folder / "metrics" / "metrics"
        scores[int(folder.name)] = json.loads(file.read_text())["score"] if file.exists() else None
    return lines, scores, int(load_arrays(workdir, lambda name: name == "step")["step"])


@pytest.fixture(scope="module")
def uninterrupted(pipeline, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    go(make_run(pipeline), workdir)
    found = results(workdir)
    assert [line["step"] for line in found[0]] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 11]
    assert found[1:] == ({8: 0.75, 9: None, 11: 0.25}, 11)
    return found


MOMENTS = ("measuring", "before the line of", "after the line of")


@pytest.mark.parametrize("moment", [*(f"{what} {step}" for step in SCORES for what in MOMENTS), ""])
def test_an_evaluation_that_was_cut_short_is_made_up_for(pipeline, uninterrupted, tmp_path, moment):
    """With "", a finished run is started again: it stays as it is."""
    with pytest.raises(Killed) if moment else contextlib.nullcontext():
        go(make_run(pipeline, moment), tmp_path)
    go(make_run(pipeline), tmp_path)
    assert results(tmp_path) == uninterrupted


def test_changes_are_named_and_those_that_training_feels_need_a_flag(tmp_path, capsys):
    begun, config = tmp_path / "begun", tiny.get_config()
    with Checkpoints(begun, keep=1, config=config) as checkpoints:
        checkpoints.save(initial().replace(step=np.int32(3)), None)
    capsys.readouterr()
    check_changes(config, begun, accepted=False)
    assert capsys.readouterr().out == ""
    config.data.root, config.data.workers, config.eval.nms_iou = "/elsewhere", 0, 0.25
    config.model.pretrained, config.train.duration = "gone", "500 steps"
    check_changes(config, begun, accepted=False)
    notes = capsys.readouterr().out.splitlines()
    assert "note: config.train.duration is now '500 steps', before '6 steps'" in notes
    assert len(notes) == 5
    config.train.batch_size, config.optimizer.drops = 8, ("1 epochs",)
    check_changes(config, tmp_path, accepted=False)  # nothing there to resume
    with pytest.raises(UserError) as error:
        check_changes(config, begun, accepted=False)
    message = str(error.value)
    assert "config.train.batch_size: found 8, expected 4" in message
    assert "config.optimizer.drops: found ('1 epochs',), expected ('20 steps',)" in message
    assert "duration" not in message
    check_changes(config, begun, accepted=True)
    assert len(capsys.readouterr().out.splitlines()) == 7
