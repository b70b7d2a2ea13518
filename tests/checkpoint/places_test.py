"""Results of one step never lie in its folder, which training deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignps_jax.checkpoint.places import is_step, results_folder
from alignps_jax.checkpoint.store import load_config
from alignps_jax.cli import main
from configs import tiny


@pytest.fixture
def run(tmp_path) -> Path:
    """A workdir with two steps, of which only the configurations are there."""
    about = {"config": json.loads(tiny.get_config().to_json()), "arrays": {}}
    for step in ("9", "200"):
        manifest = tmp_path / "run" / "checkpoints" / step / "manifest" / "metadata"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps(about))
    return tmp_path / "run"


def test_results_of_a_step_go_beside_the_checkpoints(run, tmp_path, monkeypatch):
    step = run / "checkpoints" / "200"
    (run / "model").mkdir()  # somebody's
    assert not is_step(run)
    assert load_config(run).seed == 0
    for path, expected in (
        (run, run),
        (run / "checkpoints", run),
        (step, run / "step_200"),
        (run / "step_200", run / "step_200"),
    ):
        assert results_folder(path) == expected
    assert results_folder(step.rename(tmp_path / "copy")) == tmp_path / "copy_results"
    monkeypatch.chdir(run / "checkpoints" / "9")
    assert results_folder(Path()) == run / "step_9"


@pytest.mark.parametrize("more", ["--mode=evaluate", "--mode=search --query=q.jpg --gallery=g"])
def test_modes_choose_a_lasting_place(run, more, capsys):
    # What is in the way of the result shows where it would go.
    step = run / "checkpoints" / "200"
    (run / "step_200").write_text("in the way")
    assert main(["launch.py", *more.split(), f"--checkpoint={step}"]) == 2
    assert "/run/step_200: found a file, expected a folder for" in capsys.readouterr().err
    assert [path.name for path in step.iterdir()] == ["manifest"]
