"""The comparisons' floors and rows; nothing here depends on real times."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alignps_jax.experiments.benchmark.measure import Timing
from alignps_jax.experiments.benchmark.report import Report
from alignps_jax.nn.model import build_model, weights_template
from configs import tiny
from tests.benchmark import deform_conv, measure, toim
from tests.benchmark.__main__ import main
from tests.benchmark.growth_cases import made_up_batch
from tests.benchmark.measure import COLUMNS, Context, FloatRate, Row
from tests.benchmark.network import forward, plain_arithmetic


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
        flops = measure.program_cost(*deform_conv.plain_work(arrays, backward)).flops
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


def test_rate_is_that_of_the_better_program():
    def timer(functions, *, runs):
        assert runs == 3
        assert list(functions) == ["product", "convolution"]
        return {"product": timing(1e-3), "convolution": timing(1e-6)}

    rate = FloatRate(runs=3, quick=True, timer=timer)
    # Inside the border, every location of the 16 x 16 map has nine taps; 3 x 16 - 2 on average.
    pairs = 46 * 46 * 32 * 32
    assert rate() == pytest.approx(2 * pairs / 1e-6)
    assert rate.floor(4.0 * pairs) == pytest.approx(2e-6)


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
            function, arguments = deform_conv.make_work(arrays, backward)
            ours = function(*arguments)
            theirs = deform_conv.torch_function(context, arrays, backward)()
            if not backward:
                np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)
                continue
            d_inputs, d_offsets, d_kernel, *_ = theirs
            np.testing.assert_allclose(ours[1][0], d_inputs.permute(0, 2, 3, 1), atol=1e-5)
            expected = d_offsets.permute(0, 2, 3, 1).reshape(ours[1][1].shape)
            np.testing.assert_allclose(ours[1][1], expected, atol=1e-5)
            np.testing.assert_allclose(ours[1][2], d_kernel.permute(2, 3, 1, 0), atol=1e-5)


def test_released_loops_agree_with_ours(tmp_path):
    torch = pytest.importorskip("torch")
    config = tiny.get_config("released")
    config.loss.queue_channels, config.loss.triplet_first_lut_identity = None, 1
    context = make_context(tmp_path, torch=torch, config=config)
    positives, memory = toim.made_up_people(context, toim.PEOPLE)
    ours = toim.make_work(context, positives, memory)[0]()[0]
    (theirs,) = toim.torch_function(context, positives, memory)()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_floor_of_the_network_has_the_same_outputs_with_less_arithmetic():
    """In bfloat16, so that a floor in another type would show."""
    config = tiny.get_config()
    config.model.dtype = "bfloat16"
    model, batch = build_model(config), made_up_batch((64, 96), people=1, images=1)
    weights = weights_template(model)

    def measured():
        run = partial(forward, model, train=False)
        args = weights.params, weights.frozen, batch
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, *args))
        return shapes, measure.program_cost(run, *args)

    shapes, cost = measured()
    with plain_arithmetic():
        plain_shapes, floor = measured()
    assert plain_shapes == shapes
    assert 0.1 * cost.flops < floor.flops < cost.flops


def test_share_of_the_training_step(tmp_path):
    made = []

    def measure_step(context, case):
        made.append(case)
        return 8.0

    context = make_context(tmp_path, quick=False)
    for _ in range(2):  # the second time it is known
        share = toim.share_of_step(context, 0.1, measure_step)
        assert share.startswith("1.25% of a training step (batch 2, 1000")
    assert made == [toim.CASES[0]]
    assert toim.share_of_step(make_context(tmp_path), 0.1, measure_step) == ""


def test_toim_from_the_command_line(tmp_path, capsys):
    assert main(["--what=toim", "--quick", "--runs=2", f"--workdir={tmp_path}"]) == 0
    part = Report(tmp_path / "benchmark.json", COLUMNS, Row).parts["toim"]
    assert part.complete
    assert part.quick
    first, second = part.rows
    assert (first.time.runs, second.time.runs) == (2, 2)
    assert first.name == "216 positives in 216 rows"
    assert second.name == "216 positives in 1080 rows"
    assert first.name in capsys.readouterr().out
    document = json.loads((tmp_path / "benchmark.json").read_text())
    assert document["parts"]["toim"]["rows"][0]["goal"] == toim.GOAL


def test_a_part_that_does_not_exist(tmp_path, capsys):
    assert main(["--what=deform_convs", f"--workdir={tmp_path}/x"]) == 2
    assert "did you mean 'deform_conv'?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
