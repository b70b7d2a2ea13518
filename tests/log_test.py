"""The log of a run, as its readers see it."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from alignps_jax.log import MetricLog, read_log


def test_log_round_trip(tmp_path):
    with MetricLog(tmp_path / "run") as log:
        log.scalars(np.int64(5), {"loss": np.float32(0.5), "loss/oim": 2})
        log.scalars(10, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3})
        # Visible at once, also to other processes.
        assert len(read_log(tmp_path / "run" / "log.jsonl")) == 2
    first, (step, values) = read_log(tmp_path / "run" / "log.jsonl")
    assert first == (5, {"loss": 0.5, "loss/oim": 2.0})
    assert step == 10
    assert values["learning_rate"] == 1e-3
    assert math.isnan(values["loss"])
    assert math.isnan(values["grad_norm"])
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text  # neither is JSON


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def run(log, steps):
        for step in steps:
            log.scalars(step, {"loss": step / 7})
            if step % 4 == 0:
                log.scalars(step, {"eval/detection/AP": step / 100})

    with MetricLog(tmp_path / "whole") as log:
        run(log, range(1, 13))
    with MetricLog(tmp_path / "resumed") as log:
        log.truncate_after(0)  # nothing there yet
        log.scalars(1, {"loss": 5})
        log.truncate_after(0)
        run(log, range(1, 10))
    with MetricLog(tmp_path / "resumed") as log:
        log.truncate_after(4)
        run(log, range(5, 13))
    whole, resumed = ((tmp_path / name / "log.jsonl") for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


DAMAGED = ["hello", "[1]", '{"loss": 1}', '{"step": 1, "loss": "x"}', "", "\0" * 80]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_costs_that_line_and_a_note(tmp_path, line, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n{"step": 3}\n')
    assert [step for step, _ in read_log(path)] == [1, 2, 3]
    note = capsys.readouterr().out
    assert note.startswith(f"note: {path}, line 2: found ")
    assert len(note.splitlines()) == 1
    with MetricLog(tmp_path) as log:
        log.truncate_after(2)
        log.scalars(3, {"loss": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 3.0}\n'
    assert capsys.readouterr().out == note


def test_what_is_measured_again_replaces_its_line(tmp_path):
    with MetricLog(tmp_path) as log:
        log.scalars(1, {"eval/all/mAP": 0.1})
        log.scalars(2, {"loss": 1.0})
        log.scalars(2, {"eval/all/mAP": 0.5})
        log.truncate_after(2, again="eval/")
        log.scalars(2, {"eval/all/mAP": 0.6})
    assert [values for _, values in read_log(tmp_path / "log.jsonl")] == [
        {"eval/all/mAP": 0.1},
        {"loss": 1.0},
        {"eval/all/mAP": 0.6},
    ]


def test_a_full_disk_is_an_error_at_once(tmp_path):
    """With a limit on the size of files; Python does not die of its signal."""
    script = (
        "import pathlib, resource, sys; import numpy as np\n"
        "from alignps_jax.log import MetricLog\n"
        "folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "try:\n"
        "  with MetricLog(folder) as log:\n"
        "    log.scalars(1, {'loss': 1})\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "    if what == 'log':\n"
        "      for step in range(2, 9): log.scalars(step, {'loss': step})\n"
        "    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), 'uint8')\n"
        "    log.images(2, 'noise', noise)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    for what in ("log", "tensorboard"):
        folder = tmp_path / what
        command = [sys.executable, "-c", script, str(folder), what]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        assert done.stdout == "File too large\n"
    with MetricLog(tmp_path / "log") as log:
        log.scalars(9, {"loss": 9})
    steps = [step for step, _ in read_log(tmp_path / "log" / "log.jsonl")]
    assert steps == [*range(1, len(steps)), 9]


def test_tensorboard_shows_the_resumed_run_only_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLog(tmp_path) as log:
        for step in range(1, 6):
            log.scalars(step, {"loss": step})
    with MetricLog(tmp_path) as log:
        log.truncate_after(3)
        log.scalars(4, {"loss": 40})
        log.images(4, "detections", np.full((6, 9, 3), 200, np.uint8))
    assert len(os.listdir(tmp_path / "tensorboard")) == 2
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    (image,) = events.Images("detections")
    assert (image.height, image.width) == (6, 9)
