"""The course of a run, judged by the lines of its picture."""

import numpy as np
import pytest

from alignps_jax.files import read_image
from alignps_jax.log import read_log
from alignps_jax.training import curves

MAX_PIXELS = 2 * 10**7


def test_curves_of_one_point_none_or_some(tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "plots" / "curves.png"
    for text in (
        "",
        '{"step": 0, "loss": 1.0}\n',
        '{"step": 7, "eval/TestG50/mAP": 0.5, "eval/all/top1": 0.1}\n',
        '{"step": 1, "loss": null, "loss/oim": 0.0}\n{"step": 2, "loss": null}\n{"st',
    ):
        log.write_text(text)
        curves.training_curves(log, out)
        assert read_image(out, MAX_PIXELS).shape == (900, 1600, 3)


def lines_of_figure(log):
    """What is plotted, by label: steps and values of the last curve of that label."""
    figure = curves.curves_figure(read_log(log))
    return {
        (axes.get_title(), line.get_label()): (line.get_xdata(), line.get_ydata())
        for axes in figure.axes
        for line in axes.lines
    }


def test_later_lines_of_a_step_win_and_evaluations_are_in_percent(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 10, "loss": 1.0, "loss/oim": 0.25}\n{"step": 20, "loss": 9.0}\n'
        '{"step": 20, "eval/TestG50/mAP": 0.5, "eval/TestG50/top1": 0.75,'
        ' "eval/detection/AP": 0.3}\n'
        '{"step": 20, "loss": 2.0}\n{"step": 15, "loss": 4.0}\n{"step": 30, "loss": null}\n'
    )
    seen = lines_of_figure(log)
    steps, values = seen["losses", "total"]
    np.testing.assert_array_equal(steps, [10, 15, 20])
    np.testing.assert_array_equal(values, [1, 4, 2])
    np.testing.assert_array_equal(seen["losses", "oim"], [[10], [0.25]])
    np.testing.assert_array_equal(seen["search (%)", "TestG50 mAP"], [[20], [50]])
    np.testing.assert_array_equal(seen["search (%)", "TestG50 top-1"], [[20], [75]])
    np.testing.assert_array_equal(seen["detection (%)", "AP"], [[20], [30]])


def test_noisy_curves_are_drawn_with_their_running_mean(tmp_path):
    values = np.random.default_rng(0).random(120)
    lines = (f'{{"step": {step}, "grad_norm": {value}}}\n' for step, value in enumerate(values))
    (tmp_path / "log.jsonl").write_text("".join(lines))
    panel = curves.curves_figure(read_log(tmp_path / "log.jsonl")).axes[1]
    faint, mean = (line.get_ydata() for line in panel.lines)
    np.testing.assert_array_equal(faint, values)
    np.testing.assert_allclose(mean[60], values[59:62].mean())
    np.testing.assert_allclose(mean[0], values[:2].mean())


def test_curves_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        curves.training_curves(tmp_path / "log.jsonl", tmp_path / "a.png")
