"""Plots, judged by their lines."""

import numpy as np
import pytest

from alignps_jax.evaluation.precision_recall import PrecisionRecall
from alignps_jax.figures.plots import (
    GallerySizes,
    Reference,
    gallery_size_plot,
    precision_recall_plot,
    rendered,
)
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


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).random(23)
    for window in (1, 3, 5):
        expected = [
            values[max(0, i - window // 2) : i + window // 2 + 1].mean() for i in range(len(values))
        ]
        np.testing.assert_allclose(curves._running_mean(values, window), expected)


def test_curves_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
        curves.training_curves(tmp_path / "log.jsonl", tmp_path / "a.png")


def test_gallery_sizes_and_the_papers_metrics():
    figure = gallery_size_plot(
        GallerySizes(
            {"a": {"50": 0.5, "all": 0.25}, "b": {"100": 0.75}},
            ("50", "100", "all"),
            (Reference("paper", "100", 93.1),),
        )
    )
    picture = rendered(figure)
    assert picture.shape == (720, 1080, 3)
    assert picture.dtype == np.uint8
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["a"].get_ydata(), [50, np.nan, 25])
    np.testing.assert_array_equal(lines["b"].get_ydata(), [np.nan, 75, np.nan])
    np.testing.assert_array_equal(lines["paper"].get_xydata(), [[1, 93.1]])
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 1
    np.testing.assert_array_equal(dotted[0].get_ydata(), [93.1, 93.1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50", "100", "all"]


def test_precision_recall_panels():
    curve = PrecisionRecall(np.array([0, 0.5, 1]), np.array([1.0, 0.5]))
    nothing = PrecisionRecall(np.array([0.0, 1.0]), np.zeros(1))
    figure = precision_recall_plot({str(number): {"a": curve, "b": nothing} for number in range(4)})
    assert rendered(figure).shape == (1200, 1950, 3)  # two rows of three
    assert [axes.get_title() for axes in figure.axes] == list("0123")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["a: 75.0", "b: 0.0"]
    values, edges, _ = figure.axes[0].patches[0].get_data()
    np.testing.assert_array_equal(values, [1, 0.5])
    np.testing.assert_array_equal(edges, [0, 0.5, 1])
