"""Plots, judged by their lines."""

import numpy as np

from alignps_jax.evaluation.metrics import PrecisionRecall
from alignps_jax.figures.plots import gallery_size_plot, precision_recall_plot, rendered


def test_gallery_sizes_and_the_papers_metrics():
    maps = {"a": {"all": 0.25, "4000": 0.375, "50": 0.5}, "b": {"100": 0.75}}
    figure = gallery_size_plot(maps, {"paper": 93.1})
    picture = rendered(figure)
    assert picture.shape == (720, 1080, 3)
    assert picture.dtype == np.uint8
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["a"].get_ydata(), [50, np.nan, 37.5, 25])
    np.testing.assert_array_equal(lines["b"].get_ydata(), [np.nan, 75, np.nan, np.nan])
    np.testing.assert_array_equal(lines["paper"].get_xydata(), [[1, 93.1]])
    assert [line.get_linestyle() for line in axes.lines].count(":") == 1
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50", "100", "4000", "all"]
    without = gallery_size_plot({"a": {"50": 0.5}}, {"paper": 93.1}).axes[0]
    assert [line.get_label() for line in without.lines] == ["a"]  # the paper has another gallery


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
