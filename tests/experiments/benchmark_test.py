"""`--mode=benchmark`: clocks, tables and files; nothing here depends on real times."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

import launch
from alignps_jax.evaluation.metrics import search_metrics
from alignps_jax.experiments.benchmark import parts, report, simulate
from alignps_jax.experiments.benchmark.measure import (
    Row,
    Timing,
    Work,
    peak_memory,
    time_in_turns,
    timed,
)
from alignps_jax.experiments.benchmark.parts import Context
from alignps_jax.experiments.benchmark.run import run_parts
from alignps_jax.types import UserError
from configs import cuhk, tiny
from data_pipeline.pipeline import photo_of


def timing(median):
    return Timing(median, 0.5 * median, 3 * median, runs=4)


class FakeTime:
    """A clock that only moves when one of its functions runs."""

    def __init__(self):
        self.now, self.calls = 100.0, []

    def function(self, name, *durations):
        """Takes these seconds, one after the other."""
        remaining = iter(durations)

        def call():
            self.calls.append(name)
            self.now += next(remaining)

        return call

    def clock(self):
        return self.now


def test_functions_take_turns_and_warm_up_does_not_count():
    fake = FakeTime()
    functions = {"a": fake.function("a", 50, 3, 1, 2), "b": fake.function("b", 70, 8, 4, 8)}
    times = time_in_turns(functions, runs=3, clock=fake.clock)
    assert "".join(fake.calls) == "baabbaab"
    assert times == {"a": Timing(2, 1, 3, 3), "b": Timing(8, 4, 8, 3)}


def test_results_are_waited_for():
    class Result:
        waited = False

        def block_until_ready(self):
            self.waited = True

    result = Result()
    time_in_turns({"a": lambda: {"inside": [result]}}, runs=1, warmup=0)
    assert result.waited


def test_runs_must_be_positive():
    with pytest.raises(ValueError, match="found 0"):
        time_in_turns({"a": lambda: None}, runs=0)


def test_throughput_is_of_the_median_run():
    work = Work("a", lambda: None, items=6, unit="photos", memory=7.0, compile=2.0)
    (row,) = timed("part", [work], runs=3)
    assert row.throughput == 6 / row.time.median
    assert (row.part, row.name, row.unit) == ("part", "a", "photos")
    assert (row.memory, row.compile, row.time.runs) == (7.0, 2.0, 3)


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def test_peak_memory_by_hand():
    compiled = jax.jit(lambda a, b: a @ b).lower(shape(64, 32), shape(32, 16)).compile()
    known = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert known <= peak_memory(compiled) <= known + 4096


def fake_part(rows, error=None):
    def part(context):
        yield from rows
        if error is not None:
            raise error

    return part


def two_rows(name):
    return [Row(name, f"{name} {i}", timing(i + 1.0), throughput=0.5, unit="x") for i in range(2)]


def benchmark(tmp_path, parts, what=None):
    context = Context(tiny.get_config(), 2, quick=True)
    run_parts(parts, what, context, report.Report(tmp_path / "benchmark.json"))


def complete(tmp_path):
    found = report.Report(tmp_path / "benchmark.json").parts
    return {name: part.complete for name, part in found.items()}


def names_of(path):
    document = json.loads(path.read_text())
    return {
        part: [row["name"] for row in fields["rows"]] for part, fields in document["parts"].items()
    }


def test_what_cuts_a_run_short_loses_no_row(tmp_path, capsys):
    parts = {
        "first": fake_part(two_rows("first")),
        "second": fake_part(two_rows("second")[:1], KeyboardInterrupt()),
        "third": fake_part(two_rows("third")),
    }
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, parts)
    file = tmp_path / "benchmark.json"
    assert names_of(file) == {"first": ["first 0", "first 1"], "second": ["second 0"]}
    assert complete(tmp_path) == {"first": True, "second": False}
    assert (tmp_path / "benchmark.md").read_text().count("Cut short") == 1
    printed = capsys.readouterr().out
    assert "second 0" in printed
    assert "second 1" not in printed


def test_only_parts_that_are_asked_for_are_replaced(tmp_path):
    parts = {name: fake_part(two_rows(name)) for name in ("first", "second", "third")}
    benchmark(tmp_path, parts, " third,first")
    before = report.Report(tmp_path / "benchmark.json").parts
    assert list(before) == ["first", "third"]
    again = Row("first", "again", timing(9.0), memory=18.0)
    benchmark(tmp_path, parts | {"first": fake_part([again])}, "first")
    after = report.Report(tmp_path / "benchmark.json").parts
    assert list(after) == ["first", "third"]
    assert after["first"].rows == (again,)
    assert after["third"] == before["third"]
    assert after["third"].rows == tuple(two_rows("third"))


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"parts": {"a": 1}}', '{"parts": {"a": {"rows": []}}}']
)
def test_a_file_of_something_else(text, tmp_path):
    (tmp_path / "benchmark.json").write_text(text)
    found = r"benchmark\.json: found (something else|no JSON), expected"
    with pytest.raises(UserError, match=found):
        report.Report(tmp_path / "benchmark.json")
    assert (tmp_path / "benchmark.json").read_text() == text


def test_markdown(tmp_path):
    rows = (
        Row("p", "plain|name", timing(2.0), throughput=0.5, unit="photos", compile=3.0),
        Row("p", "other", Timing(3.5e-4, 3.5e-4, 3.5e-4, 1), memory=2.5e9),
    )
    machine = report.machine_line()
    found = report.Report(tmp_path / "benchmark.json")
    found.write("p", report.PartResult(machine, False, True, rows), order=["p"])
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    assert lines[0] == "## p"
    assert lines[2] == "|  | time | range | throughput | memory | compile |"
    assert lines[4] == ("| plain\\|name | 2.00 s | 1.00 s to 6.00 s | 0.500 photos/s |  | 3.00 s |")
    assert lines[5] == "| other | 350 µs |  |  | 2.50 GB |  |"
    assert lines[7] == machine + "."
    assert f"jax {jax.__version__}" in machine
    assert "cpu" in machine


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123.4, "123 s"),
        (1.0, "1.00 s"),
        (0.0999, "99.9 ms"),
        (2e-6, "2.00 µs"),
        (3e-8, "0.0300 µs"),
    ],
)
def test_seconds(value, text):
    assert report.seconds(value) == text


def test_size():
    assert [report.size(v) for v in (7.0, 20480, 1.5e9)] == ["0.00700 kB", "20.5 kB", "1.50 GB"]


def test_made_up_photos_are_of_the_size_asked_for_and_differ():
    split = simulate.made_up_split(2, (120, 200), people=3)
    photos = [photo_of(split, index) for index in range(len(split.jpegs))]
    assert [photo.shape for photo in photos] == [(120, 200, 3)] * 2
    assert np.abs(photos[0].astype(int) - photos[1]).mean() > 10
    for boxes in split.annotations.boxes:
        assert boxes.shape == (3, 4)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= (200, 120)).all()


def test_made_up_evaluation_is_as_large_as_it_says_and_not_trivial():
    people = simulate.made_up_people(50, (90, 150), people=4, identities=10)
    protocol = simulate.made_up_protocol(people, 20)
    assert len(protocol.query_image) == 20
    assert all(len(gallery) == 49 for gallery in protocol.gallery)
    found = simulate.made_up_detections(people, 16)
    assert (len(found.scores), found.embeddings.shape) == (200, (200, 16))
    for image in range(50):
        assert (np.diff(found.scores[found.of(image)]) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
    assert 0.05 < search_metrics(protocol, found, score_threshold=0.0).mAP < 1


@pytest.mark.parametrize("quick", [False, True])
def test_every_device_gets_as_many_photos_whatever_the_batch_size(quick):
    config = cuhk.get_config()
    before = config.to_json()
    config.train.batch_size, config.eval.batch_size = 3, 5
    usable = Context(config, 1, quick).usable_config()
    assert usable.train.batch_size % jax.device_count() == 0
    assert usable.eval.batch_size % jax.device_count() == 0
    config.train.batch_size, config.eval.batch_size = 4, 4
    assert config.to_json() == before


@pytest.mark.parametrize("name", ["inference", "train"])
def test_networks_run_on_all_devices(name):
    works = parts.PARTS[name](Context(tiny.get_config(), 1, quick=True))
    for work in works:
        assert work.items % jax.device_count() == 0
        assert work.memory > 0
        assert work.compile > 0
        for _ in range(2):  # buffers are donated
            arrays = jax.tree.leaves(work.run())
            floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
            assert all(np.isfinite(x).all() for x in floats)


def test_data_search_and_evaluation_from_the_command_line(tmp_path, capsys):
    argv = ["launch.py", "--mode=benchmark", "--what=search,data,evaluate", "--quick", "--runs=2"]
    with flagsaver.flagsaver():
        assert launch.main([*argv, f"--workdir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    found = report.Report(tmp_path / "benchmark.json").parts
    assert list(found) == ["data", "search", "evaluate"]
    for part in found.values():
        assert part.complete
        assert part.quick
        for row in part.rows:
            assert row.throughput > 0
            assert row.time.runs == 2
            assert row.name in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--what=trains",), "did you mean 'train'?"),
        (("--what=",), "--what: found ''"),
        (("--what=search", "--runs=0"), "--runs: found 0"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    with flagsaver.flagsaver():
        code = launch.main(["launch.py", "--mode=benchmark", f"--workdir={tmp_path}/x", *flags])
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
