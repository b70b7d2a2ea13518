"""Results of one step never lie in its folder, which training deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignps_jax.checkpoint.places import check_lasting, is_step, results_folder
from alignps_jax.checkpoint.store import load_config
from alignps_jax.cli import main
from alignps_jax.figures.kinds import figure_request
from alignps_jax.types import UserError
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
    assert results_folder(run) == run
    assert results_folder(run / "checkpoints") == run
    assert results_folder(step) == run / "step_200"
    assert results_folder(run / "step_200") == run / "step_200"
    step.rename(tmp_path / "copy")
    assert results_folder(tmp_path / "copy") == tmp_path / "copy_results"
    monkeypatch.chdir(run / "checkpoints" / "9")
    assert results_folder(Path()) == run / "step_9"
    assert figure_request(".", load_config, None, None, None, None).workdir == (
        run / "step_9" / "figures"
    )


def test_only_the_folder_of_a_step_is_none_for_results(run):
    step = run / "checkpoints" / "200"
    for path in (step, step / "a" / "b.safetensors"):
        with pytest.raises(UserError, match=r"^--target: found \S+, inside the checkpoint \S+/200"):
            check_lasting("--target", path)
    (run / "model").mkdir()  # of somebody's project
    assert not is_step(run)
    assert load_config(run).seed == 0
    for path in (run, run / "out", run / "checkpoints" / "out"):
        check_lasting("--target", path)


@pytest.mark.parametrize("flag", ["workdir", "checkpoint"])
def test_an_address_is_refused_at_once(flag, tmp_path, monkeypatch, capsys):
    """As a path, gs://bucket would make a folder of that name here."""
    monkeypatch.chdir(tmp_path)
    words = ["--mode=train", "--config=configs/tiny.py", f"--{flag}=gs://bucket/run"]
    assert main(["launch.py", *words]) == 2
    assert f"--{flag}: found gs://bucket/run, expected a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--mode=evaluate", "--checkpoint={step}", "--workdir={step}/out"],
        ["--mode=evaluate", "--detections={step}/detections.npz"],
        ["--mode=search", "--checkpoint={step}", "--query=q", "--gallery=g", "--workdir={step}"],
        ["--mode=visualize", "--checkpoint={step}", "--what=gallery_size", "--workdir={step}"],
        ["--mode=export", "--checkpoint={step}", "--target={step}/a.safetensors"],
        ["--mode=train", "--config=configs/tiny.py", "--workdir={step}/again"],
    ],
)
def test_no_mode_writes_into_the_folder_of_a_step(run, words, capsys):
    step = run / "checkpoints" / "200"
    assert main(["launch.py", *(word.format(step=step) for word in words)]) == 2
    assert "inside the checkpoint" in capsys.readouterr().err
    assert [path.name for path in step.iterdir()] == ["manifest"]


@pytest.mark.parametrize(
    "words",
    [
        ["--mode=evaluate", "--checkpoint={step}"],
        ["--mode=evaluate", "--workdir={step}"],
        ["--mode=search", "--checkpoint={step}", "--query=q.jpg", "--gallery=g"],
        ["--mode=visualize", "--checkpoint={step}", "--what=gallery_size"],
    ],
)
def test_modes_choose_a_lasting_place_and_say_so(run, words, capsys):
    # What is in the way of the result shows where it would go.
    step = run / "checkpoints" / "200"
    (run / "step_200").write_text("in the way")
    assert main(["launch.py", *(word.format(step=step) for word in words)]) == 2
    printed = capsys.readouterr()
    assert "/run/step_200: found a file, expected a folder for" in printed.err
    assert f"results go to {run / 'step_200'}" in printed.out
    assert [path.name for path in step.iterdir()] == ["manifest"]
