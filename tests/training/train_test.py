"""The whole road in seconds: it learns, ends when it is told to, and says what is wrong.

Runs are real processes, as a user starts them, on the tiny synthetic scenes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignps_jax.checkpoint.store import chosen_by, load_arrays, load_config
from alignps_jax.evaluation.scoring import evaluate_detections
from tests.places import ROOT


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory) -> Path:
    """Data set and compiled programs that the runs of this module share."""
    return tmp_path_factory.mktemp("shared")


def command(shared: Path, workdir: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "launch.py",
        "--config=configs/tiny.py",
        f"--config.data.root={shared / 'tiny'}",
        f"--workdir={workdir}",
        *flags,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """That of the tests, with another number of simulated devices."""
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}


def launch(
    shared: Path, workdir: Path, *flags: str, long: bool = False
) -> subprocess.CompletedProcess[str]:
    """A run to its end; a `long` one in code that takes longer to compile and runs faster."""
    link_cache(shared, workdir)
    env = environment()
    if long:
        env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    return subprocess.run(
        command(shared, workdir, *flags),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def begin(shared: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    """A run under way, with both outputs in one."""
    return subprocess.Popen(
        command(shared, workdir, *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def link_cache(shared: Path, workdir: Path) -> None:
    """Makes the workdir's compilation cache a link to the shared one."""
    (shared / "xla_cache").mkdir(exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "xla_cache").exists():
        (workdir / "xla_cache").symlink_to(shared / "xla_cache")


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Every training line of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "data_wait")
    return {
        line["step"]: {name: x for name, x in line.items() if name not in clock}
        for line in lines
        if "loss" in line
    }


@pytest.fixture(scope="module")
def whole_run(shared_dir) -> Path:
    """An uninterrupted run."""
    workdir = shared_dir / "whole"
    done = launch(shared_dir, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_writes_what_it_promises(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {
        "checkpoints",
        "config.json",
        "versions.json",
        "curves.png",
        "detections.npz",
        "log.jsonl",
        "metrics.json",
        "queries.csv",
        "rankings.png",
        "tensorboard",
    }
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert metrics["dataset"] == "synthetic"
    assert metrics["checkpoint_step"] == 6
    assert metrics["checkpoint_chosen_by"] == "search mAP on the test split"
    assert metrics["score_threshold"] == 0.2
    assert set(metrics["detection"]) == set(metrics["detection_labelled"]) == {"recall", "AP"}
    assert set(metrics["search"]["TestG50"]) == {"mAP", "top1", "top5", "top10"}
    assert sorted(losses(whole_run)) == [1, 2, 3, 4, 5, 6]
    assert {line["padding"] for line in losses(whole_run).values()} == {0.0}


def log_lines(workdir: Path) -> list[str]:
    log = workdir / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def test_sigterm_saves_and_leaves_with_its_exit_code(shared_dir):
    workdir = shared_dir / "terminated"
    link_cache(shared_dir, workdir)
    duration = ("--config.train.duration=400 steps", "--config.train.checkpoint_every=1000 steps")
    process = begin(shared_dir, workdir, *duration)
    while process.poll() is None and len(log_lines(workdir)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert "SIGTERM: step" in output
    (step,) = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert int(step) == max(losses(workdir))


def test_sigterm_saves_while_a_later_program_compiles(shared_dir):
    workdir = shared_dir / "two_programs"
    link_cache(shared_dir, workdir)
    # With this seed, the second shape comes with step 7.
    scales = "--config.data.train_scales=((128,96),(160,120))"
    flags = (scales, "--config.data.max_programs=2", "--config.seed=2")
    flags += ("--config.train.duration=8 steps", "--config.train.checkpoint_every=1000 steps")
    process = begin(shared_dir, workdir, *flags)
    while process.poll() is None and len(log_lines(workdir)) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert time.monotonic() - start < 10
    assert "96x128 images (1 of at most 2 programs)" in said
    assert "128x160 images (2 of at most 2 programs)" in said
    assert "SIGTERM: step 6 is saved; the same command resumes from it" in said
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]


def test_a_second_run_is_refused_and_ctrl_c_ends_the_first_while_it_compiles(shared_dir, tmp_path):
    process = begin(shared_dir, tmp_path)  # without compiled programs
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None
    files = sorted(tmp_path.rglob("*.jsonl")), (tmp_path / "checkpoints").stat().st_mtime_ns
    second = subprocess.run(
        command(shared_dir, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert second.returncode == 2
    assert f"(process {process.pid} on {os.uname().nodename}, started " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert second.stdout == ""
    assert files == (
        sorted(tmp_path.rglob("*.jsonl")),
        (tmp_path / "checkpoints").stat().st_mtime_ns,
    )
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert time.monotonic() - start < 5
    assert output.splitlines()[-1] == "Ctrl-C: nothing is lost; the same command starts again"
    assert not (tmp_path / "writer.lock").exists()


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
    assert chosen_by(workdir) == metrics["checkpoint_chosen_by"]
    assert chosen_by(workdir / "checkpoints" / "6") == "hand"


def test_evaluate_and_search_take_the_run(shared_dir, whole_run, tmp_path):
    done = launch(shared_dir, tmp_path / "again", "--mode=evaluate", f"--checkpoint={whole_run}")
    assert done.returncode == 0, done.stderr
    first, again = (
        json.loads((path / "metrics.json").read_text()) for path in (whole_run, tmp_path / "again")
    )
    assert again["search"] == first["search"]
    assert again["checkpoint_chosen_by"] == first["checkpoint_chosen_by"]
    assert "checkpoint step 6 (chosen by search mAP on the test split)" in done.stdout
    assert list(first["search"]) == ["TestG50", "all"]

    # Without the network, the photos or a --config: the same figures.
    rescored = tmp_path / "rescored"
    saved = whole_run / "detections.npz"
    evaluate_detections(load_config(whole_run), saved, rescored)
    scores = json.loads((rescored / "metrics.json").read_text())
    unknown = ("checkpoint_step", "checkpoint_chosen_by")
    assert scores | {name: first[name] for name in unknown} == first
    queries = (rescored / "queries.csv").read_text()
    assert queries == (whole_run / "queries.csv").read_text()

    photos = shared_dir / "tiny" / "Image" / "SSM"
    photo = sorted(photos.iterdir())[0]
    search = [
        sys.executable,
        "launch.py",
        "--mode=search",
        f"--checkpoint={whole_run}",
        f"--query={photo}",
        f"--gallery={photos}",
        f"--workdir={tmp_path / 'search'}",
    ]
    done = subprocess.run(
        search, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    # Six steps find nobody: a clear end, not a crash.
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {photo}: found nobody")


def test_a_checkpoint_of_another_network_names_the_parameters(shared_dir, whole_run):
    done = launch(shared_dir, whole_run, "--mode=evaluate", "--config.model.channels=32")
    assert "note: config.model.channels is 32 as typed" in done.stdout
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "params/" in done.stderr
    assert "lateral3" in done.stderr or "output3" in done.stderr or "head" in done.stderr


def test_a_loss_that_is_not_finite_names_term_step_and_images(shared_dir, tmp_path):
    done = launch(
        shared_dir,
        tmp_path,
        "--config.optimizer.learning_rate=1e20",
        "--config.optimizer.warmup=0 steps",
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: step 2: ")
    assert "loss/cls" in error.split(" not finite")[0]
    assert ".jpg" in error
