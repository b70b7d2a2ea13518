"""The course of a run, judged by the lines of its picture."""

import json

import numpy as np
import pytest

from alignps_jax.files import read_image
from alignps_jax.log import read_log
from alignps_jax.training import curves


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 0, "loss": 1.0}\n',
        '{"step": 7, "eval/TestG50/mAP": 0.5, "eval/all/top1": 0.1}\n',
        '{"step": 1, "loss": null, "loss/oim": 0.0}\n{"step": 2, "loss": null}\n{"st',
    ],
)
def test_curves_of_one_point_none_or_some(tmp_path, text):
    log, out = tmp_path / "log.jsonl", tmp_path / "plots" / "curves.png"
    log.write_text(text)
    curves.training_curves(log, out)
    assert read_image(out, 2 * 10**7).shape == (900, 1600, 3)


def plotted(folder, lines):
    """What is plotted of these lines, by panel: labels, steps and values."""
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = curves.curves_figure(read_log(folder / "log.jsonl"))
    return {
        axes.get_title(): [(x.get_label(), x.get_xdata(), x.get_ydata()) for x in axes.lines]
        for axes in figure.axes
    }


def test_later_lines_of_a_step_win_and_evaluations_are_in_percent(tmp_path):
    evaluation = {"eval/TestG50/mAP": 0.5, "eval/TestG50/top1": 0.75, "eval/detection/AP": 0.3}
    losses = {15: 4.0, 20: 2.0, 30: None}
    lines = [{"step": 10, "loss": 1.0, "loss/oim": 0.25}, {"step": 20, "loss": 9.0}]
    lines += [{"step": 20, **evaluation}, *({"step": n, "loss": x} for n, x in losses.items())]
    found = {
        label: (list(steps), list(values))
        for panel in plotted(tmp_path, lines).values()
        for label, steps, values in panel
    }
    assert found["total"] == ([10, 15, 20], [1, 4, 2])
    assert found["oim"] == ([10], [0.25])
    assert found["TestG50 mAP"] == ([20], [50])
    assert found["TestG50 top-1"] == ([20], [75])
    assert found["AP"] == ([20], [30])


def test_noisy_curves_are_drawn_with_their_running_mean(tmp_path):
    values = np.random.default_rng(0).random(120).tolist()
    lines = [{"step": step, "grad_norm": value} for step, value in enumerate(values)]
    (_, _, faint), (_, _, mean) = plotted(tmp_path, lines)["gradient norm"]
    np.testing.assert_array_equal(faint, values)
    np.testing.assert_allclose(mean[60], np.mean(values[59:62]))
    np.testing.assert_allclose(mean[0], np.mean(values[:2]))
