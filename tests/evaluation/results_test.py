"""Tables, JSON results and the log, seen as their readers see them."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from alignps_jax.evaluation import results as report
from alignps_jax.evaluation.cbgm import ContextMatching
from alignps_jax.evaluation.metrics import DetectionMetrics, SearchMetrics
from alignps_jax.files import write_atomically
from alignps_jax.gallery.query import FoundPerson, QueryRanking, write_ranking_json
from alignps_jax.log import LogLine, MetricLog, read_log
from alignps_jax.types import UserError

DTYPES = {"Flo": float, "Int": int, "Boo": bool}


def search_metrics(mean_ap, top1, top5, top10):
    nothing = {
        field.name: () if field.name == "precision" else np.zeros(0, DTYPES[field.type[:3]])
        for field in dataclasses.fields(SearchMetrics)[4:]
    }
    return SearchMetrics(mean_ap, top1, top5, top10, **nothing)


def evaluation(protocols=("TestG50", "TestG100"), factor=1.0, step=41000):
    return report.EvaluationResult(
        dataset="cuhk_sysu",
        step=step,
        score_threshold=0.2,
        boxes="detected",
        context=None,
        detection=DetectionMetrics(0.903 * factor, 0.812 * factor, 8, 9, np.zeros(0)),
        labeled_detection=DetectionMetrics(0.95 * factor, 0.6 * factor, 5, 9, np.zeros(0)),
        searches={
            name: search_metrics(*(factor * np.array([0.931, 0.9345, 0.98, 1.0]) - 0.01 * i))
            for i, name in enumerate(protocols)
        },
    )


def test_table_shows_every_system_and_protocol_in_percent(capsys):
    rows = [
        report.ResultRow("trained", evaluation()),
        report.ResultRow("untrained", evaluation(factor=0.1, step=0)),
    ]
    report.print_results(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    detection = ["90.3", "81.2", "95.0", "60.0"]
    assert ["trained", *detection, "TestG50", "93.1", "93.5", "98.0", "100.0"] in lines
    assert ["TestG100", "92.1", "92.5", "97.0", "99.0"] in lines
    untrained = ["9.0", "8.1", "9.5", "6.0", "TestG50", "9.3", "9.3", "9.8", "10.0"]
    assert ["untrained", *untrained] in lines
    assert any({"cuhk_sysu,", "41000,", "0.2;"} <= set(line) for line in lines)


def test_title_and_metrics_say_what_chose_the_step(tmp_path):
    by = "search mAP on the validation split"
    result = dataclasses.replace(evaluation(), chosen_by=by)
    assert f"checkpoint step 41000 (chosen by {by})," in result.conditions
    report.write_metrics_json(tmp_path / "metrics.json", result)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["checkpoint_chosen_by"] == by


def test_title_says_what_is_not_the_rule():
    usual = evaluation()
    assert usual.conditions == "cuhk_sysu, checkpoint step 41000, scores >= 0.2"
    other = dataclasses.replace(
        usual, step=None, boxes="ground_truth", context=ContextMatching(30, 4)
    )
    expected = "cuhk_sysu, ground truth boxes, context matching 30, 4, scores >= 0.2"
    assert other.conditions == expected


def test_table_is_plain_and_fits_80_columns_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # what a narrow terminal would export
    report.print_results([report.ResultRow("untrained", evaluation(("TestG4000", "cross_camera")))])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"cross_camera +92\.1 +92\.5 +97\.0 +99\.0\s*\n", out)


def test_table_survives_an_ascii_stdout(monkeypatch, tmp_path):
    with (tmp_path / "out.txt").open("w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        report.print_results([report.ResultRow("trained", evaluation())])
    assert "93.1" in (tmp_path / "out.txt").read_text()


def test_table_without_search_protocols(capsys):
    report.print_results([report.ResultRow("trained", evaluation(protocols=()))])
    assert ["trained", "90.3", "81.2", "95.0", "60.0"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_metrics_json(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    report.write_metrics_json(path, evaluation())
    assert json.loads(path.read_text()) == {
        "dataset": "cuhk_sysu",
        "checkpoint_step": 41000,
        "checkpoint_chosen_by": None,
        "score_threshold": 0.2,
        "boxes": "detected",
        "context_matching": [],
        "iou_threshold": 0.5,
        "detection": {"recall": 0.903, "AP": 0.812},
        "detection_labelled": {"recall": 0.95, "AP": 0.6},
        "search": {
            "TestG50": {"mAP": 0.931, "top1": 0.9345, "top5": 0.98, "top10": 1.0},
            "TestG100": pytest.approx({"mAP": 0.921, "top1": 0.9245, "top5": 0.97, "top10": 0.99}),
        },
    }


def test_metrics_json_with_an_untrained_network_and_numpy_numbers(tmp_path):
    untrained = report.EvaluationResult(
        "cuhk_sysu",
        np.int32(0),
        np.float32(0.2),
        "detected",
        None,
        DetectionMetrics(np.float32(0.25), np.float64(0.5), 8, 9, np.zeros(0)),
        DetectionMetrics(0.5, 1.0, 8, 9, np.zeros(0)),
        {"all": search_metrics(*np.array([0.125, 0.5, 0.25, 0.75], np.float32))},
    )
    report.write_metrics_json(tmp_path / "m.json", evaluation(), untrained)
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["untrained"] == {
        "detection": {"recall": 0.25, "AP": 0.5},
        "detection_labelled": {"recall": 0.5, "AP": 1.0},
        "search": {"all": {"mAP": 0.125, "top1": 0.5, "top5": 0.25, "top10": 0.75}},
    }
    saved = dataclasses.replace(untrained, step=None, context=ContextMatching(10, 3))
    report.write_metrics_json(tmp_path / "m.json", saved)
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["checkpoint_step"] is None
    assert content["context_matching"] == [10, 3]


def test_ranking_json(tmp_path):
    box = np.array([1.5, 2, 30, 40.125], np.float32)
    found = FoundPerson("b.jpg", box + 1, np.float32(0.9), np.float32(0.3))
    rankings = [
        QueryRanking("a.jpg", box, (found,)),
        QueryRanking("c.jpg", box, ()),
    ]
    write_ranking_json(tmp_path / "r.json", rankings)
    first, second = json.loads((tmp_path / "r.json").read_text())
    assert first["query"] == {"image": "a.jpg", "box": [1.5, 2, 30, 40.12]}
    assert first["results"] == [
        {"image": "b.jpg", "box": [2.5, 3, 31, 41.12], "similarity": 0.9, "score": 0.3}
    ]
    assert second["results"] == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    path.write_bytes(b"old")

    def fail(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", fail)
    with pytest.raises(UserError, match=r"m\.json.*No space left"):
        write_atomically(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("target", ["file/metrics.json", "folder"])
def test_unwritable_targets_are_user_errors(tmp_path, target):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=target) as error:
        report.write_metrics_json(tmp_path / target, evaluation())
    assert "\n" not in str(error.value)


def test_log_round_trip(tmp_path):
    with MetricLog(tmp_path / "run") as log:
        log.scalars(np.int64(5), {"loss": np.float32(0.5), "loss/oim": 2})
        log.scalars(10, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3})
        # Visible at once, also to other processes.
        assert len(read_log(tmp_path / "run" / "log.jsonl")) == 2
    first, second = read_log(tmp_path / "run" / "log.jsonl")
    assert first == LogLine(5, {"loss": 0.5, "loss/oim": 2.0})
    assert second.step == 10
    assert second.values["learning_rate"] == 1e-3
    assert math.isnan(second.values["loss"])
    assert math.isnan(second.values["grad_norm"])
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text  # neither is JSON


def test_log_of_a_killed_process_goes_on(tmp_path):
    script = (
        "import os, sys, pathlib; from alignps_jax.log import MetricLog\n"
        "log = MetricLog(pathlib.Path(sys.argv[1]))\n"
        "for step in range(3): log.scalars(step, {'loss': step})\n"
        'pathlib.Path(sys.argv[1], "log.jsonl").open("ab", 0).write(b\'{"step": 3, "lo\')\n'
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / "log.jsonl"
    assert not path.read_bytes().endswith(b"\n")
    assert [line.step for line in read_log(path)] == [0, 1, 2]
    with MetricLog(tmp_path) as log:
        log.scalars(3, {"loss": 3.0})
    assert [line.step for line in read_log(path)] == [0, 1, 2, 3]


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def run(log, steps):
        for step in steps:
            log.scalars(step, {"loss": step / 7})
            if step % 4 == 0:
                log.scalars(step, {"eval/detection/AP": step / 100})

    with MetricLog(tmp_path / "whole") as log:
        run(log, range(1, 13))
    with MetricLog(tmp_path / "resumed") as log:
        run(log, range(1, 10))
    with MetricLog(tmp_path / "resumed") as log:
        log.truncate_after(4)
        run(log, range(5, 13))
    whole, resumed = ((tmp_path / name / "log.jsonl") for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_truncating_to_the_start_empties_the_log(tmp_path):
    with MetricLog(tmp_path) as log:
        log.truncate_after(0)  # nothing there yet
        log.scalars(1, {"loss": 1.0})
        log.truncate_after(0)
        log.scalars(1, {"loss": 2.0})
    assert read_log(tmp_path / "log.jsonl") == (LogLine(1, {"loss": 2.0}),)


DAMAGED = ["hello", "[1]", '{"loss": 1}', '{"step": 1, "loss": "x"}', "", "\0" * 80]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_costs_that_line_and_a_note(tmp_path, line, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n{"step": 3}\n')
    assert [line.step for line in read_log(path)] == [1, 2, 3]
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
    assert [line.values for line in read_log(tmp_path / "log.jsonl")] == [
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
    steps = [line.step for line in read_log(tmp_path / "log" / "log.jsonl")]
    assert steps == [*range(1, len(steps)), 9]


def test_missing_log_and_unwritable_workdir(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_log(tmp_path / "nowhere" / "log.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        MetricLog(tmp_path / "file")


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
