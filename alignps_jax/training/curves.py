"""The course of a training run in one picture."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignps_jax.files import write_atomically
from alignps_jax.log import Line, read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By title, a pattern for the names of the measurements.
PANELS = {
    "losses": "loss(/.+)?",
    "gradient norm": "grad_norm",
    "learning rate": "learning_rate",
    "search": "eval/.+/(mAP|top1)",
    "detection": "eval/detection/.+",
    "speed": "images_per_second",
}


def training_curves(log_path: Path, out_path: Path) -> None:
    """Draws the log of a training run into a PNG file."""
    data = io.BytesIO()
    curves_figure(read_log(log_path)).savefig(data, format="png")
    write_atomically(out_path, data.getvalue())


def curves_figure(lines: Sequence[Line]) -> Figure:
    """The `PANELS`; of a step that the log holds twice, the later line counts."""
    from matplotlib.figure import Figure  # slow, and only for the end of a run

    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for step, measured in lines:
        for name, value in measured.items():
            curves[name][step] = value
    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    panels = zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True)
    for axes, (title, pattern) in panels:
        for name in filter(re.compile(pattern).fullmatch, curves):
            steps, values = zip(*sorted(curves[name].items()), strict=True)
            axes.plot(steps, values, marker="." if len(steps) <= 30 else "", label=name)
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure
