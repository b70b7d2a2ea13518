"""`--mode=scaling`: what is read from programs, the gate's processes, and the measurement."""

import dataclasses
import json
import signal
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from jax import lax

import launch
from alignps_jax.devices import sum_over_devices
from alignps_jax.experiments.scaling import gate, measure
from alignps_jax.experiments.scaling.arithmetic import products
from alignps_jax.experiments.scaling.cases import Case, cases, parse_scale
from alignps_jax.experiments.scaling.chips import CHIPS, Topology, parse_topologies
from alignps_jax.experiments.scaling.program import array_bytes, work_of
from alignps_jax.experiments.scaling.table import Table
from alignps_jax.types import UserError
from configs import cuhk, tiny

# A loop of 7 rounds and one of 9 whose length only its condition tells, a conditional, an
# asynchronous and a synchronous collective, and kernels that take a part of their operand.
PROGRAM = """HloModule made_up

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%rows (table: f32[100,64], places: s32[10,1]) -> f32[10,64] {
  %table = f32[100,64]{1,0:T(8,128)S(1)} parameter(0)
  %places = s32[10,1]{1,0} parameter(1)
  ROOT %taken = f32[10,64]{1,0} gather(%table, %places), index_vector_dim=1, slice_sizes={1,64}
}

%body (s: (s32[], f32[10,64])) -> (s32[], f32[10,64]) {
  %s = (s32[], f32[10,64]{1,0}) parameter(0)
  %x = f32[10,64]{1,0} get-tuple-element(%s), index=1
  %y = f32[10,64]{1,0} fusion(%x), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"50"}
  ROOT %t = (s32[], f32[10,64]{1,0}) tuple(%x, %y)
}

%condition (s: (s32[], f32[10,64])) -> pred[] {
  %s.1 = (s32[], f32[10,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%cheap (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%x.1), backend_config={"estimated_cycles":"3"}
}

%dear (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} copy(%x.2), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (p: f32[100,64], q: s32[10,1], r: s32[]) -> f32[8] {
  %p = f32[100,64]{1,0} parameter(0)
  %q = s32[10,1]{1,0} parameter(1)
  %g = f32[10,64]{1,0} fusion(%p, %q), kind=kLoop, calls=%rows
  %w = (s32[], f32[10,64]{1,0}) while(%t), condition=%condition, body=%body, ANNOTATION
  %v = (s32[], f32[10,64]{1,0}) while(%t), condition=%condition, body=%body
  %z = f32[8]{0} conditional(%r, %g, %g), branch_computations={%cheap, %dear}
  %start = ((f32[4]{0}), (f32[16]{0})) all-gather-start(%u), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %all = f32[8]{0} all-reduce(%z), to_apply=%add
}
""".replace("ANNOTATION", 'backend_config={"known_trip_count":{"n":"7"}}')


def test_a_program_by_hand():
    work = work_of(PROGRAM)
    assert work.collectives == {"all-gather": 64, "all-reduce": 32}
    assert work.collective_counts == {"all-gather": 1, "all-reduce": 1}
    # The gather, 16 rounds of the loops, one branch, two collectives.
    assert work.kernels == 1 + 16 + 1 + 2
    assert work.cycles["elementwise"] == 16 * 50
    assert work.cycles["gathers"] == 10 * 4.5  # rows that come from the near memory
    assert work.cycles["copies"] == 3
    assert work_of(PROGRAM, max).cycles["copies"] == 1000
    # Ten rows read and written, and their places: not the complete table.
    assert work.bytes["gathers"] == 2 * 10 * 64 * 4 + 10 * 4
    assert work.bytes["elementwise"] == 16 * 2 * 10 * 64 * 4


def test_a_loop_whose_turns_depend_on_data_counts_none_or_one():
    text = PROGRAM.replace("constant(9)", "get-tuple-element(%s.1), index=0")
    assert work_of(text).cycles["elementwise"] == 7 * 50
    assert work_of(text, max).cycles["elementwise"] == (7 + 1) * 50


def test_kernels_of_our_own_count_by_their_arithmetic():
    line = (
        '  ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{,"cost_estimate":{"flops":"262144","bytes":"1"}}}'
    )
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{line}\n}}\n"
    assert work_of(text).cycles == {"own kernels": 2}


def test_a_branch_that_gives_up_does_not_stand_for_one_that_multiplies():
    product = "dot(%x.2, %x.2), lhs_contracting_dims={0}, rhs_contracting_dims={0}, "
    text = PROGRAM.replace("copy(%x.2), ", product)
    assert work_of(text).cycles["copies"] == 0
    assert work_of(text).cycles["products"] == 1000


def test_bytes_of_types():
    assert array_bytes("f32[2,3]{1,0}") == 24
    assert array_bytes("(bf16[4]{0:T(8,128)(2,1)S(1)}, pred[], /*index=5*/s64[2]{0})") == 8 + 1 + 16
    assert array_bytes("token[]") == 0


def test_an_empty_program_does_nothing():
    assert work_of("").kernels == 0


def test_a_compiled_loop_counts_as_often_as_it_runs():
    def steps(count):
        def run(x):
            return lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, length=count)[0]

        shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
        return work_of(jax.jit(run).lower(shape).compile().as_text()).bytes["products"]

    assert steps(20) == pytest.approx(2 * steps(10))
    assert steps(10) >= 10 * 2 * 64 * 64 * 4  # read and written


def test_collectives_of_a_compiled_sum():
    program = sum_over_devices(jax.devices()[:4])
    text = program.lower(jax.ShapeDtypeStruct((4, 100), jnp.float32)).compile().as_text()
    assert work_of(text).collectives == {"all-reduce": 400}


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return products(jax.make_jaxpr(function)(*arrays).jaxpr)


def test_arithmetic_by_hand():
    assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(jnp.sin, (100,)) == 0

    def conv(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=numbers)

    assert counted(conv, (1, 9, 9, 4), (3, 3, 4, 8)) == 2 * 4 * 4 * 8 * 9 * 4

    def loop(x):
        return lax.scan(lambda c, _: (c @ c, None), x, length=6)[0]

    assert counted(loop, (4, 4)) == 6 * 2 * 4**3

    def either(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(either, (4, 4)) == 2 * 4**3

    def again_or_never(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x, jnp.zeros_like, x)

    assert counted(again_or_never, (4, 4)) == 2 * 4**3


def test_the_gradient_of_a_strided_convolution_counts_no_zeros():
    def loss(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=numbers).sum()

    shapes = (1, 32, 32, 4), (3, 3, 4, 8)
    forward = counted(loss, *shapes)
    assert counted(jax.grad(loss), *shapes) == pytest.approx(2 * forward, rel=0.1)


def test_topologies():
    pod, row = parse_topologies("cpu:2, cpu:8,cpu:2")
    assert (pod.name, pod.count, row.count) == ("cpu:2", 2, 8)
    assert "device_count=8" in row.environment()["XLA_FLAGS"]
    assert Topology("h100:32x8", CHIPS["h100"], (32, 8)).count == 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5f:2x4"], "--topology: found 'v5f', expected one of v5e"),
        (["--topology=v5e:8"], "expected v5e: and its shape, such as v5e:2x4"),
        (["--topology=v5p:2x2"], "expected v5p: and its shape, such as v5p:2x2x1"),
        (["--topology=h100:0"], "--topology: found 'h100:0'"),
        (["--topology=cpu"], "--topology: found 'cpu'"),
        (["--topology=cpu:2", "--what=trains"], "--what: found 'trains', expected some of"),
        (["--topology=cpu:2", "--scale=600x1000"], "--scale: found '600x1000', expected"),
        (["--topology=cpu:2", "--batch=0"], "--batch: found 0, expected 1 or more"),
        (["--runs=0"], "--runs: found 0, expected 1 or more"),
        (["--target=here.txt"], "--target: found 'here.txt', expected a file that ends in .json"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        assert launch.main(["launch.py", "--mode=scaling", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_compiler_that_is_missing_says_how_to_get_it():
    with pytest.raises(UserError, match="for v5e:2x4 is not installed here; make setup-acc"):
        parse_topologies("v5e:2x4")


def test_steps():
    config = cuhk.get_config()
    assert cases(config, "train, inference,train", None, 4) == [
        Case("train", (1216, 2016), 4),
        Case("inference", (928, 1504), 4),
    ]
    every = cases(config, "epoch", None, 1)
    assert len(every) == 12
    assert {case.step for case in every} == {"train"}
    assert cases(config, "train", parse_scale("1000x600"), 1)[0].size == (608, 1024)


# A network that compiles quickly.
QUICK = {"lateral_deform": False, "output_deform": False, "head_convs": 0}
TWO = Topology("cpu:2", CHIPS["cpu"], (2,))
H100 = Topology("h100:8", CHIPS["h100"], (8,))
STEP = Case("train", (608, 1024), 4)
ANSWER = {
    "devices": 8,
    "compile_seconds": 3.0,
    "peak_memory": 5e9,
    "flops": 4947e9,
    "kernels": 12,
    "bytes": {"products": 3.35232e9, "gathers": 2 * 3.35232e9},
    "collectives": {"all-reduce": 225e6},
    "collective_counts": {"all-reduce": 2},
}


def process(program):
    """A compiler's process that only runs these lines."""
    return (sys.executable, "-c", f"import os, signal, sys\n{program}")


def compiled(program, topology=TWO):
    return gate.compile_row(tiny.get_config(), topology, STEP, process(program))


def test_a_compiler_that_aborts_is_a_row():
    lines = "sys.stderr.write('F0000 x.cc:1] Check failed: 5452 == 188\\nmore\\n')\nos.abort()"
    row = compiled(lines)
    assert row.problem == "SIGABRT: Check failed: 5452 == 188"
    assert row.devices == 0
    row = compiled("os.kill(os.getpid(), signal.SIGKILL)")
    assert signal.SIGKILL.name in row.problem


def test_what_a_compiler_refuses_is_a_row():
    said = "RESOURCE_EXHAUSTED: Ran out of memory. Used 23.30G of 15.75G hbm. Exceeded by 7.55G."
    answer = json.dumps({"problem": f"XLA:TPU compile permanent error.\n{said}\nTotal"})
    assert compiled(f"print({answer!r})").problem == "Used 23.30G of 15.75G hbm"
    assert compiled("raise ValueError('no such thing')").problem == "ValueError: no such thing"


def test_estimates_by_hand():
    row = compiled(f"print({json.dumps(ANSWER)!r})", H100)
    assert row.problem == ""
    expected = {
        "arithmetic": 10e-3,
        "memory of products": 1e-3,
        "memory of gathers": 2e-3,
        "collectives": 1e-3,
    }
    assert gate.seconds(row, H100.chip) == pytest.approx(expected)
    assert row.dominates == "arithmetic (71%)"
    assert row.products == "float32 default"  # as training multiplies
    cycles = {"products": 3e6, "gathers": 6e6}
    row = compiled(f"print({json.dumps(ANSWER | {'cycles': cycles})!r})", H100)
    assert row.dominates == "gathers (67%)"


def test_more_memory_than_the_chip_has_does_not_fit():
    row = compiled(f"print({json.dumps(ANSWER | {'peak_memory': 90e9})!r})", H100)
    assert row.problem == "does not fit: 90.0 GB of 84.9 GB"


def test_rows_stay_until_they_are_replaced(tmp_path):
    target = tmp_path / "gate.json"
    first, second = compiled("raise ValueError('a')"), compiled("raise ValueError('b')", H100)
    for row in (first, second):
        Table(target, gate.Row, {"problem": lambda row: row.problem}).add(row)
    again = compiled(f"print({json.dumps(ANSWER)!r})")
    columns = {"problem": lambda row: row.problem, "kernels": lambda row: str(row.kernels)}
    table = Table(target, gate.Row, columns)
    table.add(again)
    found = Table(target, gate.Row, columns).rows
    assert [row.problem for row in found.values()] == ["", "ValueError: b"]
    assert target.with_suffix(".md").read_text().splitlines()[2:] == [
        "|  | 12 |",
        "| ValueError: b | 0 |",
        "",
        again.origin,
    ]


def test_what_computes_in_another_way_is_a_row_of_its_own(tmp_path):
    table = Table(tmp_path / "gate.json", gate.Row, {"type": lambda row: row.type})
    fields = [{}, {"remat": True}, {"dtype": "bfloat16", "remat": True}]
    base = compiled(f"print({json.dumps(ANSWER)!r})")
    for changed in fields:
        table.add(dataclasses.replace(base, **changed))
        table.add(dataclasses.replace(base, step="inference", **changed))
    assert [row.type for row in table.rows.values() if row.step == "train"] == [
        "float32 default",
        "float32 default remat",
        "bfloat16 remat",
    ]
    # What only training reads changes nothing there.
    inference = [row.type for row in table.rows.values() if row.step == "inference"]
    assert inference == ["float32 default", "bfloat16"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"a": 1}]}', '{"rows": 3}'])
def test_a_file_of_something_else_stays(tmp_path, text):
    target = tmp_path / "gate.json"
    target.write_text(text)
    with pytest.raises(UserError, match=r"gate\.json: found (something else|no JSON), expected"):
        Table(target, gate.Row, {})
    assert target.read_text() == text


def test_the_gate_compiles_for_devices_that_are_not_here(tmp_path, capsys):
    target = tmp_path / "gate.json"
    flags = ["--topology=cpu:3", "--what=inference", "--scale=64x64", "--batch=2"]
    fields = [f"--config.model.{name}={value}" for name, value in QUICK.items()]
    with flagsaver.flagsaver():
        argv = ["launch.py", "--mode=scaling", "--config=configs/tiny.py", f"--target={target}"]
        assert launch.main([*argv, *flags, *fields]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert row["problem"] == ""
    assert (row["devices"], row["batch"], row["size"]) == (3, 2, [64, 64])
    assert row["flops"] > 1e6
    assert row["kernels"] > 10
    assert row["peak_memory"] > 2 * 64 * 64 * 3
    assert f"jax {jax.__version__}" in row["origin"]
    assert "compiles" in capsys.readouterr().out


def test_counts_and_shares_of_devices():
    assert measure.device_counts(1) == [1]
    assert measure.device_counts(6) == [1, 2, 4, 6]
    assert measure.device_counts(8) == [1, 2, 4, 8]
    found = measure.scalings(5, [1, 2, 4])
    assert found == {"weak": [(1, 5), (2, 5), (4, 5)], "strong": [(1, 8), (2, 4), (4, 2)]}
    for pairs in (measure.scalings(4, [1, 2, 4, 6])["strong"], found["strong"]):
        assert len({count * batch for count, batch in pairs}) == 1


def test_measured_on_simulated_devices(tmp_path, capsys):
    target = tmp_path / "measured.json"
    step = Case("inference", (64, 64), 1)
    config = tiny.get_config()
    config.model.update(QUICK)
    measure.measure_scaling(config, [step], target, runs=2, devices=jax.devices()[:2])
    assert measure.SIMULATED in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert [(row["scaling"], row["devices"], row["batch"]) for row in rows] == [
        *(("weak", 1, 1), ("weak", 2, 1)),
        *(("strong", 1, 2), ("strong", 2, 1)),
    ]
    assert {row["dtype"] for row in rows} == {"float32 highest"}
    for row in rows:
        measured = row["measured"]
        assert measured["rate"] > 0
        assert 0 <= measured["data_wait"] <= 1
        assert measured["collective_bytes"] == 0  # inference sends nothing
    assert [row["efficiency"] for row in rows if row["devices"] == 1] == [1, 1]
    expected = rows[1]["measured"]["rate"] / rows[0]["measured"]["rate"] / 2
    assert rows[1]["efficiency"] == pytest.approx(expected)
    assert np.frombuffer(target.with_suffix(".png").read_bytes()[:8], "S4")[0] == b"\x89PNG"
    assert "simulated" in target.with_suffix(".md").read_text()
