"""Where results cannot be written, every mode says so before its work, in one line."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from alignps_jax.checkpoint.store import load_config
from alignps_jax.evaluation.evaluate import evaluate_checkpoint
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.experiments.benchmark.run import run_benchmark
from alignps_jax.experiments.reproduce import reproduce_table, run_folder
from alignps_jax.figures.kinds import draw_figures, figure_request
from alignps_jax.files import check_outputs
from alignps_jax.gallery.photos import search_photos
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.types import UserError
from alignps_jax.weights.convert import convert_released, export_released
from configs import cuhk, tiny

# Whatever is read from here is an error of its own, which must not be the first one.
NOWHERE = Path("nowhere/at-all")

MODES = {
    "train": partial(train_and_evaluate, tiny.get_config()),
    "evaluate": partial(evaluate_checkpoint, tiny.get_config(), NOWHERE),
    "evaluate detections": partial(evaluate_detections, tiny.get_config(), NOWHERE),
    "search": partial(search_photos, NOWHERE, tiny.get_config(), NOWHERE, None, NOWHERE),
    "visualize": lambda workdir: draw_figures(
        "detections", figure_request("nowhere", load_config, "photo.jpg", None, None, str(workdir))
    ),
    "export": lambda workdir: export_released(NOWHERE, Path(workdir, "weights.safetensors")),
    "convert": partial(convert_released, cuhk.get_config(), NOWHERE),
    "benchmark": partial(run_benchmark, tiny.get_config(), None, runs=1, quick=True),
    "reproduce": partial(reproduce_table, tiny.get_config(), "tiny", "2", 1),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_file_where_the_results_should_go_ends_a_mode_before_its_work(mode, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"/file: found a file, expected a folder for \S+$"):
        MODES[mode](tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
@pytest.mark.parametrize("mode", MODES)
def test_a_place_that_nobody_can_write_to_ends_a_mode_before_its_work(mode):
    with pytest.raises(UserError, match=r"^/proc/none/out/\S+: cannot be written \(.+\)$"):
        MODES[mode](Path("/proc/none/out"))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("train", "curves.png"),
        ("evaluate", "metrics.json"),
        ("evaluate", "rankings.png"),
        ("evaluate detections", "queries.csv"),
        ("search", "ranking.json"),
        ("export", "weights.safetensors"),
        ("convert", "config.json"),
        ("benchmark", "benchmark.md"),
        ("reproduce", "table2.json"),
    ],
)
def test_a_folder_in_the_place_of_a_result_ends_a_mode_before_its_work(mode, name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"/{name}: found a folder, expected a file"):
        MODES[mode](tmp_path)


def test_a_run_of_other_settings_in_the_last_row_ends_a_table_before_its_first(tmp_path):
    folder = run_folder(tmp_path, "", 1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"seed": 1, "train": {"batch_size": 1}}')
    with pytest.raises(UserError, match=r"seed1: was run with config\.\S+ = None, expected"):
        reproduce_table(tiny.get_config(), "tiny", "2", 2, tmp_path)
    (folder / "config.json").write_text("[1")
    with pytest.raises(UserError, match=r"config\.json: found no JSON, expected what a"):
        reproduce_table(tiny.get_config(), "tiny", "2", 2, tmp_path)


def test_looking_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    new = tmp_path / "x" / "y" / "b.json"
    check_outputs(tmp_path / "a.json", new)
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    (tmp_path / "x").mkdir()
    check_outputs(new)
    assert os.listdir(tmp_path / "x") == []
    monkeypatch.chdir(tmp_path)
    check_outputs(Path("c.json"), Path("d/c.json"))
    assert sorted(os.listdir()) == ["a.json", "x"]


def test_a_full_disk_is_noticed(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    probe = tmp_path / f".a.json.{os.getpid()}.probe"
    probe.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(No space left on device\)"):
        check_outputs(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []
