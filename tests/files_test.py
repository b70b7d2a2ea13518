"""Files are complete or not there, and a mode says before its work that it cannot write."""

import errno
import os
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from alignps_jax.evaluation.detect import detect_source
from alignps_jax.evaluation.evaluate import evaluate_checkpoint
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.experiments.benchmark import run_benchmark
from alignps_jax.experiments.reproduce import reproduce_table
from alignps_jax.figures.kinds import draw_figures
from alignps_jax.figures.request import FigureRequest
from alignps_jax.files import check_outputs, complete_file, write_image
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
    "detect": partial(detect_source, NOWHERE, tiny.get_config(), "nowhere", 1.0),
    "visualize": partial(draw_figures, "similarity", FigureRequest((NOWHERE,), tiny.get_config)),
    "export": partial(export_released, NOWHERE),
    "convert": partial(convert_released, cuhk.get_config(), NOWHERE),
    "benchmark": partial(run_benchmark, tiny.get_config(), None, runs=1),
    "reproduce": partial(
        reproduce_table, tiny.get_config(), "tiny", "2", 1, train=train_and_evaluate
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_file_where_the_results_should_go_ends_a_mode_before_its_work(mode, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"/file: found a file, expected a folder for \S+$"):
        MODES[mode](tmp_path / "file" / "out.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_checking_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    check_outputs(tmp_path / "file", tmp_path / "x" / "y" / "b.json")
    with pytest.raises(UserError, match="found a folder, expected a file"):
        check_outputs(tmp_path)
    monkeypatch.setattr(os, "access", lambda folder, _: folder != tmp_path)  # root may write it
    with pytest.raises(PermissionError, match=r"b\.json"):
        check_outputs(tmp_path / "x" / "y" / "b.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), KeyboardInterrupt()],
)
def test_a_failure_while_writing_leaves_the_old_file(error, tmp_path):
    (tmp_path / "d.npz").write_text("old")

    def save():
        with complete_file(tmp_path / "d.npz") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        save()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno 28] No space left on device: '{tmp_path / 'd.npz'}'"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        assert not (tmp_path / "new" / "a").exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with complete_file(tmp_path / "new" / "a") as temporary:
        temporary.write_bytes(b"12345")
    assert synced == [5]
    assert (tmp_path / "new" / "a").read_bytes() == b"12345"


def test_pictures_are_png_or_jpeg_by_their_suffix(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    write_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(tmp_path / "a.png")[..., ::-1], image)
    red = np.full((32, 32, 3), (200, 30, 10), np.uint8)
    for name in ("a.jpg", "a.JPEG"):
        write_image(tmp_path / name, red)
        np.testing.assert_allclose(cv2.imread(tmp_path / name)[..., ::-1], red, atol=4)
        assert (tmp_path / name).read_bytes()[:2] == b"\xff\xd8"
