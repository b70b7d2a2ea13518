"""Runs of two processes, joined by jax.distributed, equal a run of one; they end together."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.runs import ENDLESS, await_steps, finish, launch, link_cache, losses, start

SHORT = ("--config.train.duration=3 steps", "--config.train.checkpoint_every=3 steps")


def assert_same_losses(found: dict, expected: dict) -> None:
    assert sorted(found) == sorted(expected)
    for step, line in expected.items():
        for name, value in line.items():
            # Differences of rounding grow from step to step.
            assert abs(found[step][name] - value) <= 1e-5 * 10 ** (step - 1) * abs(value), name


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory) -> Path:
    """Two processes that SLURM would have started, without data set and workdir."""
    shared = tmp_path_factory.mktemp("shared")
    workdir = shared / "pmap"
    outputs = finish(start(shared, workdir, *SHORT, slurm=True))
    assert "synthetic: preparing " in outputs[0]
    assert "preparing" not in outputs[1]  # it opens what process 0 left
    assert "curves" not in outputs[1]
    return workdir


@pytest.fixture(scope="module")
def alone(from_nothing) -> Path:
    """A run of one process with one device."""
    workdir = from_nothing.with_name("alone")
    launch(from_nothing.parent, workdir, "--config.train.duration=4 steps").check_returncode()
    return workdir


def first_steps(workdir: Path) -> dict:
    return {step: line for step, line in losses(workdir).items() if step <= 3}


def test_two_processes_from_nothing_give_the_losses_of_one_which_resumes(from_nothing, alone):
    assert_same_losses(losses(from_nothing), first_steps(alone))
    names = {path.name for path in from_nothing.iterdir()}
    assert names >= {"metrics.json", "curves.png", "log.jsonl", "config.json"}
    assert not any(name.startswith("process_") for name in names)  # process 0 alone writes
    workdir = from_nothing.with_name("fewer")
    shutil.copytree(from_nothing, workdir, ignore=shutil.ignore_patterns("xla_cache"))
    launch(from_nothing.parent, workdir, "--config.train.duration=4 steps").check_returncode()
    assert_same_losses(losses(workdir), losses(alone))


@pytest.mark.parametrize(
    ("number", "to", "code"),
    [(signal.SIGINT, "all", 130), (signal.SIGINT, "one", 130), (signal.SIGTERM, "one", 143)],
)
def test_a_signal_saves_in_all(from_nothing, alone, number, to, code):
    workdir = from_nothing.with_name(f"{number.name}-{to}")
    link_cache(from_nothing.parent, workdir)
    processes = start(from_nothing.parent, workdir, *ENDLESS)
    await_steps(workdir, processes)
    for process in processes if to == "all" else processes[1:]:
        process.send_signal(number)
    outputs = finish(processes, code=code)
    (last,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert last == max(losses(workdir)) >= 3
    said = f"step {last} is saved; the same command resumes from it\n"
    assert [output.count(said) for output in outputs] == [1, 0]
    assert_same_losses(first_steps(workdir), first_steps(alone))


def test_two_processes_evaluate_to_the_last_bit(from_nothing):
    shared = from_nothing.parent
    where = ["--mode=evaluate", f"--checkpoint={from_nothing}", "--config.eval.min_cls_score=0.0"]
    folders = shared / "evaluated", shared / "evaluated_alone"
    finish(start(shared, folders[0], *where))
    # One image for each of two devices, as there: the compiler's rounding is the same then.
    launch(shared, folders[1], *where, "--config.eval.batch_size=2", devices=2).check_returncode()
    found, expected = (np.load(folder / "detections.npz") for folder in folders)
    assert sorted(found) == sorted(expected)
    assert len(expected["scores"]) > 100
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert scores[0] == scores[1]
