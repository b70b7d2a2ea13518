"""Plots: gallery sizes (Paper, Fig. 8), precision and recall, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignps_jax.evaluation.calibration import Calibration
from alignps_jax.evaluation.metrics import PrecisionRecall

# The gallery size of Paper, Table 6; Paper, Fig. 8 gives no numbers.
PAPER_GALLERY = "100"


def gallery_size_plot(
    maps: Mapping[str, Mapping[str, float]], paper: Mapping[str, float]
) -> Figure:
    """mAP against gallery size, a curve per system; the galleries are equally far apart.

    `maps` is system -> gallery ("50", "100", ..., "all") -> search mAP, as a fraction, `paper`
    system -> published mAP for `PAPER_GALLERY`, in percent: a dotted line to a hollow mark.
    """
    galleries = sorted(
        {gallery for values in maps.values() for gallery in values},
        key=lambda gallery: math.inf if gallery == "all" else int(gallery),
    )
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for system, values in maps.items():
        percents = [100 * values.get(gallery, np.nan) for gallery in galleries]
        axes.plot(percents, marker="o", label=system)
    for number, (system, percent) in enumerate(paper.items(), start=len(maps)):
        if PAPER_GALLERY in galleries:
            place, color = galleries.index(PAPER_GALLERY), f"C{number}"
            axes.plot([-0.5, place], [percent] * 2, ":", color=color)
            axes.plot(place, percent, "D", mfc="white", color=color, label=system)
    axes.set_xticks(range(len(galleries)), galleries)
    axes.set(xlabel="gallery size", ylabel="mAP (%)", xlim=(-0.5, len(galleries) - 0.5))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def precision_recall_plot(panels: Mapping[str, Mapping[str, PrecisionRecall]]) -> Figure:
    """Panels, title -> system -> curve, row by row; the legend says the area below a curve."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 6 * rows), dpi=100, layout="constrained")
    for place, (title, systems) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for number, (system, curve) in enumerate(systems.items()):
            color, label = f"C{number}", f"{system}: {100 * curve.area:.1f}"
            axes.stairs(curve.precision, curve.edges, baseline=None, color=color, label=label)
        axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
    return figure


def calibration_plot(curves: Mapping[str, Calibration]) -> Figure:
    """Probability against similarity, a curve per system through the measured shares (dots).

    Dashed: that the person is there at all, by the similarity of the best result.
    """
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (system, curve) in enumerate(curves.items()):
        right, wrong = np.array(curve.right), np.array(curve.wrong)
        label = f"{system}: {curve.dataset}, among {curve.people:,.0f} people"
        axes.plot(curve.similarity, curve.probability, color=f"C{number}", label=label)
        axes.plot(curve.similarity, right / (right + wrong), ".", color=f"C{number}", alpha=0.4)
        axes.plot(curve.similarity, curve.there, "--", color=f"C{number}", alpha=0.7)
    axes.set(xlabel="similarity", ylabel="share of results that are right", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def rendered(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a plot, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
