"""The course of a training run in one picture."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignps_jax.evaluation.metrics import DETECTION_METRICS
from alignps_jax.files import write_atomically
from alignps_jax.log import LogLine, read_log


def training_curves(log_path: Path, out_path: Path) -> None:
    """Draws the log of a training run into a PNG file (`curves_figure`).

    Raises:
        UserError: the log cannot be read, is not a log, or the picture cannot be written.
    """
    data = io.BytesIO()
    curves_figure(read_log(log_path)).savefig(data, format="png")
    write_atomically(out_path, data.getvalue())


def curves_figure(lines: Sequence[LogLine]) -> Figure:
    """Losses, gradient norm, learning rate, evaluations and speed of a training run.

    A step that the log holds twice (training was resumed) counts as its later line says. Noisy
    curves are drawn faintly, with their running mean over them. In the search panel full lines
    are mAP, one color per protocol; the broken line is top-1 of the first one.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        for name, value in line.values.items():
            curves[name][line.step] = value
    names = list(curves)
    losses = [name for name in names if name.split("/")[0] == "loss"]
    protocols = [name.split("/")[1] for name in names if re.fullmatch("eval/[^/]+/mAP", name)]

    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for number, name in enumerate(losses):
        label = "total" if name == "loss" else name.removeprefix("loss/")
        _plot(axes[0], curves[name], label, f"C{number}", smooth=True)
    _plot(axes[1], curves["grad_norm"], "", smooth=True)
    _plot(axes[2], curves["learning_rate"], "")
    for number, protocol in enumerate(protocols):
        _plot(axes[3], _percent(curves[f"eval/{protocol}/mAP"]), f"{protocol} mAP", f"C{number}")
    for protocol in protocols[:1]:
        _plot(axes[3], _percent(curves[f"eval/{protocol}/top1"]), f"{protocol} top-1", "C0", "--")
    for number, metric in enumerate(DETECTION_METRICS):
        _plot(axes[4], _percent(curves[f"eval/detection/{metric}"]), metric, f"C{number}")
    _plot(axes[5], curves["images_per_second"], "", smooth=True)

    last_step = max((step for curve in curves.values() for step in curve), default=0)
    titles = ("losses", "gradient norm", "learning rate", "search (%)", "detection (%)")
    for panel, title in zip(axes, (*titles, "images per second"), strict=True):
        _finish(panel, title, last_step)
    return figure


def _percent(curve: Mapping[int, float]) -> dict[int, float]:
    return {step: 100 * value for step, value in curve.items()}


def _plot(
    axes: Axes,
    curve: Mapping[int, float],
    label: str,
    color: str = "C0",
    style: str = "-",
    smooth: bool = False,
) -> None:
    """Adds what is finite of a curve; few points are marked, since one alone has no line."""
    steps = [step for step in sorted(curve) if np.isfinite(curve[step])]
    if not steps:
        return
    values = np.array([curve[step] for step in steps])
    window = 1 + len(values) // 50
    if smooth and window > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, window)
    marker = "o" if len(steps) <= 30 else ""
    axes.plot(steps, values, style, marker=marker, color=color, label=label)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over up to `window` values; at the ends over those that there are."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _finish(axes: Axes, title: str, last_step: int) -> None:
    """Title, axes that start at zero and reach as far as the training, legend."""
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if not axes.lines:
        axes.text(0.5, 0.5, "no measurements", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    axes.set_ylim(0, 102 if title.endswith("(%)") else None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    labels = axes.get_legend_handles_labels()[1]
    if any(labels):
        axes.legend(ncols=1 + len(labels) // 7)
