"""Where results cannot be written, a mode says so before its work, in one line."""

import errno
from functools import partial
from pathlib import Path

import pytest

from alignps_jax.evaluation.evaluate import evaluate_checkpoint
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.experiments.benchmark import run_benchmark
from alignps_jax.experiments.reproduce import reproduce_table
from alignps_jax.files import check_outputs, complete_file
from alignps_jax.gallery.photos import search_photos
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.types import UserError
from alignps_jax.weights.convert import convert_released
from configs import cuhk, tiny

# Whatever is read from here is an error of its own, which must not be the first one.
NOWHERE = Path("nowhere/at-all")

MODES = {
    "train": partial(train_and_evaluate, tiny.get_config()),
    "evaluate": partial(evaluate_checkpoint, tiny.get_config(), NOWHERE),
    "evaluate detections": partial(evaluate_detections, tiny.get_config(), NOWHERE),
    "search": partial(search_photos, NOWHERE, tiny.get_config(), NOWHERE, None, NOWHERE),
    "convert": partial(convert_released, cuhk.get_config(), NOWHERE),
    "benchmark": partial(run_benchmark, tiny.get_config(), None, runs=1),
    "reproduce": partial(reproduce_table, tiny.get_config(), "tiny", "2", 1, train=None),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_file_where_the_results_should_go_ends_a_mode_before_its_work(mode, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"/file: found a file, expected a folder for \S+$"):
        MODES[mode](tmp_path / "file" / "out")
    check_outputs(tmp_path / "file", tmp_path / "x" / "y" / "b.json")  # changes nothing
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="found a folder, expected a file"):
        check_outputs(tmp_path)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "d.npz").write_text("old")

    def save():
        with complete_file(tmp_path / "d.npz") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"d\.npz: cannot be written \(No space"):
        save()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
