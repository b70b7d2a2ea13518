"""The whole road in seconds: it learns, ends when it is told to, and says what is wrong.

Runs are real processes, as a user starts them, on the tiny synthetic scenes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.checkpoint.store import load_arrays
from tests.runs import ENDLESS, await_steps, launch, link_cache, losses, start


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory) -> Path:
    """Data set and compiled programs that the runs of this module share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def whole_run(shared_dir) -> Path:
    """An uninterrupted run."""
    workdir = shared_dir / "whole"
    done = launch(shared_dir, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_writes_what_it_promises(whole_run):
    names = "checkpoints config.json curves.png detections.npz log.jsonl metrics.json"
    names += " queries.csv rankings.png tensorboard"
    assert {path.name for path in whole_run.iterdir()} >= set(names.split())
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert metrics["dataset"] == "synthetic"
    assert metrics["checkpoint_step"] == 6
    assert metrics["checkpoint_chosen_by"] == "being the last"
    assert metrics["score_threshold"] == 0.2
    assert set(metrics["detection"]) == set(metrics["detection_labeled"]) == {"recall", "AP"}
    assert set(metrics["search"]["TestG50"]) == {"mAP", "top1", "top5", "top10"}
    assert sorted(losses(whole_run)) == [1, 2, 3, 4, 5, 6]


def test_roi_alignps_learns_and_resumes_to_the_last_bit(shared_dir):
    """Also the memory of the RoI branch and its running statistics."""
    whole, resumed = shared_dir / "roi", shared_dir / "roi_resumed"
    flags = "--config=configs/tiny.py:roi", "--config.train.duration=24 steps"
    flags += ("--config.optimizer.drops=()", "--config.train.checkpoint_every=16 steps")
    flags += ("--config.train.batch_size=2",)
    done = launch(shared_dir, whole, *flags)
    assert done.returncode == 0, done.stderr
    log = losses(whole)
    for name in ("rpn_cls", "roi_cls", "roi_oim"):
        values = [log[step][f"loss/{name}"] for step in sorted(log)]
        assert np.mean(values[-8:]) < 0.9 * np.mean(values[:8]), name

    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "16", resumed / "checkpoints" / "16")
    done = launch(shared_dir, resumed, *flags)
    assert done.returncode == 0, done.stderr
    assert losses(resumed) == {step: line for step, line in log.items() if step > 16}
    arrays, expected = (load_arrays(x, lambda _: True) for x in (resumed, whole))
    assert {"roi_memory/lut", "roi_memory/tail", "frozen/roi/rescaler/var"} <= set(expected)
    assert expected["roi_memory/tail"] > 0
    assert expected["frozen/roi/rescaler/var"] != 1
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_gives_its_exit_code(shared_dir, number, code):
    workdir = shared_dir / number.name
    link_cache(shared_dir, workdir)
    (process,) = start(shared_dir, workdir, *ENDLESS, count=1, devices=1)
    await_steps(workdir, [process])
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "Traceback" not in output
    (step,) = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert f"step {step} is saved; the same command resumes from it" in output
    assert int(step) == max(losses(workdir))


def test_ctrl_c_outside_training_is_one_line(shared_dir, tmp_path):
    output = ignored = "Exception ignored"
    while ignored in output:  # Python drops a Ctrl-C that falls into JAX's callback of its gc
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (process,) = start(tmp_path, tmp_path / "run", count=1, devices=1)  # draws its data first
        while not (tmp_path / "run" / ".lock").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "stopped by Ctrl-C"
    assert "Traceback" not in output


def test_a_second_run_is_refused_and_the_first_one_goes_on_unread(shared_dir, tmp_path):
    link_cache(shared_dir, tmp_path)
    (process,) = start(shared_dir, tmp_path, count=1, devices=1)
    while "training on" not in process.stdout.readline():
        assert process.poll() is None
    second = launch(shared_dir, tmp_path)
    assert second.returncode == 2, second.stdout
    assert f"(process {process.pid} on {os.uname().nodename}, started " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    process.stdout.close()  # a `tee` that dies
    assert process.wait(300) == 0
    assert (tmp_path / "metrics.json").exists()


def test_a_validation_split_chooses_the_step(shared_dir):
    workdir = shared_dir / "validated"
    flags = ("--config.data.validation_fraction=0.25", "--config.train.eval_every=3 steps")
    done = launch(shared_dir, workdir, *flags)
    assert done.returncode == 0, done.stderr
    held = re.search(
        r"validation: 2 of 8 identities are held out, and with them (\d+) of 24 training photos; "
        r"\d+ queries; (\d+) identities are left to train on",
        done.stdout,
    )
    assert held is not None
    assert 0 < int(held[1]) < 24
    table = load_arrays(workdir, lambda name: name == "memory/lut")["memory/lut"]
    assert len(table) == int(held[2]) <= 6
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    score = "eval/validation/mAP"
    scores = {line["step"]: line[score] for line in lines if score in line}
    assert sorted(scores) == [3, 6]
    assert not any(name.startswith("eval/TestG50") for line in lines for name in line)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["checkpoint_chosen_by"] == "search mAP on the validation split"
    assert metrics["checkpoint_step"] == max(scores, key=lambda step: (scores[step], step))
    # The results are those of the test split.
    assert list(metrics["search"]) == ["TestG50", "all"]
    assert chosen_step(workdir)[1] == metrics["checkpoint_chosen_by"]


def test_evaluate_and_search_take_the_run(shared_dir, whole_run, tmp_path):
    metrics = whole_run / "metrics.json"
    first = json.loads(metrics.read_text())
    untrained = {name: first[name] for name in ("detection", "detection_labeled", "search")}
    # What only training can measure stays.
    metrics.write_text(json.dumps(first | {"untrained": untrained}))
    done = launch(shared_dir, whole_run, "--mode=evaluate")
    assert done.returncode == 0, done.stderr
    assert json.loads(metrics.read_text()) == first | {"untrained": untrained}
    metrics.write_text(json.dumps(first))
    assert "checkpoint step 6 (chosen by being the last)" in done.stdout
    assert list(first["search"]) == ["TestG50", "all"]

    photos = shared_dir / "tiny" / "Image" / "SSM"
    photo = sorted(photos.iterdir())[0]
    where = [f"--checkpoint={whole_run}", f"--query={photo}", f"--gallery={photos}"]
    done = launch(shared_dir, tmp_path, "--mode=search", *where)
    # Six steps find nobody: a clear end, not a crash.
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: found nobody")
