"""The course of a training run in one picture."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    last = max((line.step for line in lines), default=0)
    for axes, (title, labels) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        percent = title.endswith("(%)")
        for number, (name, label) in enumerate(labels.items()):
            curve = {step: x for step, x in sorted(curves[name].items()) if np.isfinite(x)}
            steps, values = list(curve), (100 if percent else 1) * np.array([*curve.values()])
            look = {"color": f"C{number}"}
            if len(steps) > 50:
                axes.plot(steps, values, alpha=0.25, linewidth=0.8, **look)
                ones = np.ones(1 + len(steps) // 50)
                # At the ends, the mean over the values that there are.
                counts = np.convolve(np.ones(len(steps)), ones, "same")
                values = np.convolve(values, ones, "same") / counts
            # Few points are marked, since one alone has no line.
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(steps, values, marker=marker, label=label, **look)
        axes.set(title=title, xlabel="step", xlim=(0, 1.02 * max(last, 1)))
        axes.set_ylim(0, 102 if percent else None)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(labels) > 1:
            axes.legend()
    return figure
