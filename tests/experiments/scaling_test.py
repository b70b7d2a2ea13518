"""`--mode=benchmark` and `--mode=scaling`: clocks, tables, and steps on simulated devices."""

import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import pytest

from alignps_jax.experiments import scaling
from alignps_jax.experiments.benchmark import Table, cases, run_benchmark, time_in_turns
from alignps_jax.experiments.chips import CHIPS, parse_topologies
from alignps_jax.types import UserError
from configs import cuhk, tiny


def quick_config():
    """A network that compiles quickly."""
    config = tiny.get_config()
    config.model.update({"lateral_deform": False, "output_deform": False, "head_convs": 0})
    config.data.test_scale, config.eval.batch_size = (64, 64), 1
    return config


def test_functions_take_turns_after_a_warm_up_and_results_are_waited_for():
    calls = []

    result = SimpleNamespace(block_until_ready=lambda: calls.append("waits"))
    functions = {name: lambda name=name: calls.append(name) or [result] for name in "ab"}
    times = time_in_turns(functions, runs=3)
    assert calls == 4 * ["a", "waits", "b", "waits"]
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert times["a"] == sorted(times["a"])


def test_rows_stay_until_they_are_measured_anew(tmp_path):
    for row in ({"what": "a|b", "s": 0.0123456}, {"what": "c", "s": 1234.5}):
        Table(tmp_path / "x" / "rows.json").add(row)
    Table(tmp_path / "x" / "rows.json").add({"what": "c", "s": 2.0, "note": "again"})
    rows = json.loads((tmp_path / "x" / "rows.json").read_text())["rows"]
    assert [row["s"] for row in rows] == [0.0123456, 2.0]
    table = (
        "| what | s | note |\n| --- | --- | --- |\n| a\\|b | 0.0123 |  |\n| c | 2.00 | again |\n"
    )
    assert (tmp_path / "x" / "rows.md").read_text() == table


def test_steps_and_topologies_by_name():
    messages = {
        "v5f:2x4": "--topology: found 'v5f', expected one of v5e",
        "cpu:2,h100:0": "found 'h100:0', expected a shape such as h100:2x4",
        "cpu": "--topology: found 'cpu'",
    }
    if not find_spec("libtpu"):
        messages["v5e:2x4"] = "v5e:2x4 is not installed here; make setup-accelerators"
    for text, message in messages.items():
        with pytest.raises(UserError, match=message):
            parse_topologies(text)
    with pytest.raises(UserError, match="found 'trains', expected one of inference, train"):
        cases(cuhk.get_config(), "trains", 4)
    inference, train = (str(case) for case in cases(cuhk.get_config(), None, 4))
    assert inference == "inference 1504×928, batch 4, float32 highest"
    assert train == "train 2016×1216, batch 4, float32 default"


def test_compiled_for_devices_that_are_not_here(tmp_path, monkeypatch):
    def compiled():
        scaling.run_scaling(quick_config(), "cpu:3", "inference", 2, 1, tmp_path / "rows.json")

    compiled()
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["what"] == "cpu:3, inference 64×64, batch 2, float32 highest"
    assert row["result"] == "fits"
    assert row["GFLOP"] > 1e-3
    assert row["memory, GB"] > 2 * 64 * 64 * 3 / 1e9
    monkeypatch.setitem(CHIPS, "cpu", (1e-9, "jax"))
    for flags, result in ((os.environ["XLA_FLAGS"], "does not fit"), ("--no_flag", "the compiler")):
        monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(UserError, match="1 of 1 steps do not compile or do not fit"):
            compiled()
        (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert row["result"].startswith(result)


def test_measured_on_simulated_devices(tmp_path):
    run_benchmark(quick_config(), "inference", tmp_path, 1)
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert row["from"] <= row["seconds"] <= row["to"]
    assert row["photos/s"] == pytest.approx(jax.device_count() / row["seconds"])
    case = cases(quick_config(), "inference", 1)[0]
    rows = list(scaling.measure(quick_config(), case, jax.devices()[:2], runs=1))
    assert [row["what"].removesuffix(", float32 highest") for row in rows] == [
        "weak, devices: 1, inference 64×64, batch 1",
        "weak, devices: 2, inference 64×64, batch 1",
        "strong, devices: 1, inference 64×64, batch 2",
        "strong, devices: 2, inference 64×64, batch 1",
    ]
    assert rows[0]["efficiency"] == "100%"
    expected = rows[1]["photos/s"] / rows[0]["photos/s"] / 2
    assert rows[1]["efficiency"] == f"{expected:.0%}"
