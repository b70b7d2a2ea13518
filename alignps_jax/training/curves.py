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
    """Draws the log of a training run into a PNG file (`curves_figure`)."""
    data = io.BytesIO()
    curves_figure(read_log(log_path)).savefig(data, format="png")
    write_atomically(out_path, data.getvalue())


def curves_figure(lines: Sequence[LogLine]) -> Figure:
    """Losses, gradient norm, learning rate, evaluations and speed of a training run.

    Of a step that the log holds twice, the later line counts. Noisy curves are drawn faintly, with
    their running mean over them.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        for name, value in line.values.items():
            curves[name][line.step] = value
    losses = [name for name in curves if name.split("/")[0] == "loss"]
    protocols = [name.split("/")[1] for name in curves if re.fullmatch("eval/[^/]+/mAP", name)]
    panels = {
        "losses": {name: name.partition("/")[2] or "total" for name in losses},
        "gradient norm": {"grad_norm": ""},
        "learning rate": {"learning_rate": ""},
        "search (%)": {f"eval/{protocol}/mAP": f"{protocol} mAP" for protocol in protocols}
        | {f"eval/{protocol}/top1": f"{protocol} top-1" for protocol in protocols[:1]},
        "detection (%)": {f"eval/detection/{metric}": metric for metric in DETECTION_METRICS},
        "images per second": {"images_per_second": ""},
    }
    last = max((step for curve in curves.values() for step in curve), default=0)
    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for panel, (title, labels) in zip(axes, panels.items(), strict=True):
        for number, (name, label) in enumerate(labels.items()):
            _plot(panel, curves.get(name, {}), label, f"C{number}", percent="%" in title)
        _finish(panel, title, last)
    return figure


def _plot(axes: Axes, curve: Mapping[int, float], label: str, color: str, percent: bool) -> None:
    """Adds the finite values of a curve; few points are marked, since one alone has no line."""
    steps = [step for step in sorted(curve) if np.isfinite(curve[step])]
    values = np.array([curve[step] for step in steps]) * (100 if percent else 1)
    if len(values) > 50:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        ones = np.ones(1 + len(values) // 50)
        # At the ends, the mean over the values that there are.
        counts = np.convolve(np.ones(len(values)), ones, "same")
        values = np.convolve(values, ones, "same") / counts
    if steps:
        axes.plot(steps, values, marker="o" if len(steps) <= 30 else "", color=color, label=label)


def _finish(axes: Axes, title: str, last_step: int) -> None:
    """Title, axes that start at zero and reach as far as the training, legend."""
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if not axes.lines:
        axes.text(0.5, 0.5, "no measurements", ha="center", transform=axes.transAxes)
        return
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    axes.set_ylim(0, 102 if title.endswith("(%)") else None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend()
