"""The benchmark's clocks, costs, tables and files; nothing here depends on real times."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import launch
from alignps_jax.benchmark import deform_conv, measure, report, run, toim
from alignps_jax.benchmark.measure import Context, FloatRate, Row, Timing, time_alternating
from alignps_jax.types import UserError
from configs import tiny


def timing(median):
    return Timing(median, 0.5 * median, 3 * median, runs=4)


def make_context(tmp_path, **changes):
    fields = {
        "config": tiny.get_config(),
        "runs": 1,
        "quick": True,
        "workdir": tmp_path,
        "torch": None,
        "rate": FloatRate(runs=1, quick=True),
    }
    return Context(**(fields | changes))


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
    times = time_alternating(functions, runs=3, clock=fake.clock)
    assert "".join(fake.calls) == "baabbaab"
    assert times == {"a": Timing(2, 1, 3, 3), "b": Timing(8, 4, 8, 3)}


def test_results_are_waited_for():
    class Result:
        waited = False

        def block_until_ready(self):
            self.waited = True

    result = Result()
    time_alternating({"a": lambda: {"inside": [result]}}, runs=1, warmup=0)
    assert result.waited


def test_runs_must_be_positive():
    with pytest.raises(ValueError, match="found 0"):
        time_alternating({"a": lambda: None}, runs=0)


def test_ratios_of_a_row():
    row = Row("part", "name", timing(2.0), floor=0.5, torch=timing(7.0), flops=6e12)
    assert (row.floor_ratio, row.torch_ratio, row.tflops) == (4.0, 3.5, 3.0)
    bare = Row("part", "name", timing(2.0))
    assert (bare.floor_ratio, bare.torch_ratio, bare.tflops) == (None, None, None)


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def test_cost_of_a_convolution_by_hand():
    def without_padding(inputs, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(inputs, kernel, (1, 1), "VALID", dimension_numbers=layout)

    cost = measure.program_cost(without_padding, shape(2, 9, 7, 5), shape(3, 3, 5, 11))
    # Output locations, taps, channels in and out; a product and a sum of each.
    assert cost.flops == 2 * (2 * 7 * 5) * 9 * 5 * 11
    assert cost.bytes == 4 * (2 * 9 * 7 * 5 + 9 * 5 * 11 + 2 * 7 * 5 * 11)


def test_the_arithmetic_of_the_deformable_convolutions_by_hand():
    """Padding aside, as XLA leaves it out: forward, and three times that with both gradients."""
    layer = deform_conv.Layer("wide", 6, 4, 60, 70)
    arrays = deform_conv.random_arrays(layer)
    expected = 2 * 60 * 70 * 9 * 6 * 4
    for backward, times in ((False, 1), (True, 3)):
        flops = measure.program_cost(*deform_conv._plain(arrays, backward)).flops
        assert 0.95 * times * expected < flops <= times * expected


def test_loops_count_as_often_as_they_run():
    product = 2 * 3 * 10 * 10

    def inner(x, w):
        return lax.scan(lambda carry, _: (carry @ w, None), x, None, length=4)[0]

    def outer(x, w):
        return lax.scan(lambda carry, _: (jax.jit(inner)(carry, w) @ w, None), x, None, length=5)[0]

    args = shape(3, 10), shape(10, 10)
    # Counters of the loops are a few operations more.
    assert measure.program_cost(inner, *args).flops == pytest.approx(4 * product, abs=50)
    assert measure.program_cost(outer, *args).flops == pytest.approx(25 * product, abs=300)


def test_peak_memory_by_hand():
    compiled = jax.jit(lambda a, b: a @ b).lower(shape(64, 32), shape(32, 16)).compile()
    known = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert known <= measure.peak_memory(compiled) <= known + 4096


def test_rate_is_that_of_the_better_program(monkeypatch):
    def fake(functions, *, runs):
        assert runs == 3
        return {"product": timing(1e-3), "convolution": timing(1e-6)}

    monkeypatch.setattr(measure, "time_alternating", fake)
    rate = FloatRate(runs=3, quick=True)
    # Inside the border, every location of the 16 x 16 map has nine taps; 3 x 16 - 2 on average.
    pairs = 46 * 46 * 32 * 32
    assert rate() == pytest.approx(2 * pairs / 1e-6)
    assert rate.floor(4.0 * pairs) == pytest.approx(2e-6)


def fake_part(rows, error=None):
    def part(context):
        yield from rows
        if error is not None:
            raise error

    return part


@pytest.fixture
def parts(monkeypatch):
    """Parts first, second and third; the second one breaks after a row."""
    rows = {
        name: [Row(name, f"{name} {i}", timing(i + 1.0), floor=0.5, flops=1e9) for i in range(2)]
        for name in ("first", "second", "third")
    }
    found = {name: fake_part(each) for name, each in rows.items()}
    found["second"] = fake_part(rows["second"][:1], KeyboardInterrupt())
    monkeypatch.setattr(run, "PARTS", found)
    return rows


def benchmark(tmp_path, what):
    run.run_benchmark(tiny.get_config(), what, tmp_path, runs=2, quick=True)


def names_of(path):
    document = json.loads(path.read_text())
    return {
        part: [row["name"] for row in fields["rows"]] for part, fields in document["parts"].items()
    }


def test_what_cuts_a_run_short_loses_no_row(parts, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, None)
    file = tmp_path / "benchmark.json"
    assert names_of(file) == {"first": ["first 0", "first 1"], "second": ["second 0"]}
    complete = {name: part.complete for name, part in report.Results.read(file).parts.items()}
    assert complete == {"first": True, "second": False}
    assert (tmp_path / "benchmark.md").read_text().count("Cut short") == 1
    printed = capsys.readouterr().out
    assert "second 0" in printed
    assert "second 1" not in printed


def test_only_parts_that_are_asked_for_are_replaced(parts, tmp_path, monkeypatch):
    benchmark(tmp_path, " third,first")
    before = report.Results.read(tmp_path / "benchmark.json").parts
    assert list(before) == ["first", "third"]
    again = Row("first", "again", timing(9.0), torch=timing(18.0))
    monkeypatch.setitem(run.PARTS, "first", fake_part([again]))
    benchmark(tmp_path, "first")
    after = report.Results.read(tmp_path / "benchmark.json").parts
    assert list(after) == ["first", "third"]
    assert after["first"].rows == (again,)
    assert after["third"] == before["third"]
    assert after["third"].rows == tuple(parts["third"])


def test_rows_find_what_was_measured_before(tmp_path, monkeypatch):
    def late(context):
        yield Row("late", "double", timing(2 * context.shared["early: one"]))

    early = fake_part([Row("early", "one", timing(4.0))])
    monkeypatch.setattr(run, "PARTS", {"early": early, "late": late})
    benchmark(tmp_path, None)
    rows = report.Results.read(tmp_path / "benchmark.json").parts["late"].rows
    assert rows[0].time.median == 8.0


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"parts": {"a": 1}}', '{"parts": {"a": {"rows": []}}}']
)
def test_a_file_of_something_else(text, parts, tmp_path):
    (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(UserError, match=r"benchmark\.json: found something else"):
        benchmark(tmp_path, "first")
    assert (tmp_path / "benchmark.json").read_text() == text


def test_markdown():
    machine = report.describe_machine(None, quick=False)
    rows = (
        Row("p", "plain|name", timing(2.0), floor=0.5, flops=5e10, goal="≤ 2"),
        Row("p", "other", Timing(3.5e-4, 3.5e-4, 3.5e-4, 1), memory=2.5e9),
    )
    text = report.markdown({"p": report.PartResult(machine, complete=True, rows=rows)})
    lines = text.splitlines()
    assert lines[0] == "## p"
    assert lines[2] == "|  | time | range | floor | times floor | TFLOP/s | memory | goal |"
    assert lines[4] == (
        "| plain\\|name | 2.00 s | 1.00 s to 6.00 s | 500 ms | 4.00x | 0.025 |  | ≤ 2 |"
    )
    assert lines[5] == "| other | 350 µs |  |  |  |  | 2.50 GB |  |"
    assert machine.versions["jax"] == jax.__version__
    for known in (jax.__version__, machine.date, "cpu", "100 to 100 GFLOP/s"):
        assert known in lines[7]
    assert "Cut short" not in text
    assert "Quick" not in text


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


def test_deform_conv_rows(tmp_path):
    rows = list(deform_conv.rows(make_context(tmp_path)))
    assert len({row.name for row in rows}) == len(rows) == 4
    for row in rows:
        assert row.flops > 0
        assert row.floor > 0
        assert row.memory > 0
        assert row.torch is None
    assert [layer.channels * layer.height for layer in deform_conv.LAYERS] == [
        512 * 113,
        1024 * 57,
        2048 * 29,
        768 * 113,
        256 * 113,
    ]


def test_torchvision_does_the_same_work(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    context = make_context(tmp_path, torch=torch)
    for layer in deform_conv.QUICK_LAYERS:
        arrays = deform_conv.random_arrays(layer)
        for backward in (False, True):
            function, arguments = deform_conv._work(arrays, backward)
            ours = function(*arguments)
            theirs = deform_conv._torch_function(context, arrays, backward)()
            if not backward:
                np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)
                continue
            d_inputs, d_offsets, d_kernel, *_ = theirs
            np.testing.assert_allclose(ours[1][0], d_inputs.permute(0, 2, 3, 1), atol=1e-5)
            expected = d_offsets.permute(0, 2, 3, 1).reshape(ours[1][1].shape)
            np.testing.assert_allclose(ours[1][1], expected, atol=1e-5)
            np.testing.assert_allclose(ours[1][2], d_kernel.permute(2, 3, 1, 0), atol=1e-5)


def test_share_of_the_training_step(tmp_path, monkeypatch):
    fake = FakeTime()
    step = SimpleNamespace(run=fake.function("step", 50.0, 8.0))
    made = []
    monkeypatch.setattr(toim, "make_step", lambda config, case: made.append(case) or step)
    monkeypatch.setattr(toim, "time_alternating", partial(time_alternating, clock=fake.clock))
    context = make_context(tmp_path, quick=False)
    for _ in range(2):  # the second time it is known
        assert toim._share(context, 0.1).startswith("1.25% of a training step (batch 2, 1000")
    assert made == [toim.CASES[0]]
    assert toim._share(make_context(tmp_path), 0.1) == ""


def test_toim_from_the_command_line(tmp_path, capsys):
    argv = [
        "launch.py",
        "--mode=benchmark",
        "--what=toim",
        "--quick",
        "--runs=2",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}",
    ]
    assert launch.main(argv) == 0
    part = report.Results.read(tmp_path / "benchmark.json").parts["toim"]
    assert part.complete
    assert part.machine.quick
    first, second = part.rows
    assert (first.time.runs, second.time.runs) == (2, 2)
    assert first.name == "216 positives in 216 rows"
    assert second.name == "216 positives in 1080 rows"
    assert first.name in capsys.readouterr().out
    assert "Quick run" in (tmp_path / "benchmark.md").read_text()


def test_released_loops_agree_with_ours(tmp_path):
    torch = pytest.importorskip("torch")
    config = tiny.get_config("released")
    config.loss.queue_channels, config.loss.triplet_first_lut_identity = None, 1
    context = make_context(tmp_path, torch=torch, config=config)
    positives, memory = toim.made_up_people(context, toim.PEOPLE)
    ours = toim._work(context, positives, memory)[0]()[0]
    (theirs,) = toim._torch_function(context, positives, memory)()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--what=deform_convs",), "did you mean 'deform_conv'?"),
        (("--what=",), "--what: found ''"),
        (("--what=toim", "--runs=0"), "--runs: found 0"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    code = launch.main(["launch.py", "--mode=benchmark", f"--workdir={tmp_path}/x", *flags])
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
