"""Plots: gallery sizes (Paper, Fig. 8), precision and recall."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignps_jax.evaluation.metrics import PrecisionRecall


@dataclasses.dataclass(frozen=True)
class Reference:
    """A published mAP, in percent, and the gallery that it holds for."""

    label: str
    gallery: str
    mAP: float  # noqa: N815 (its name everywhere)


@dataclasses.dataclass(frozen=True)
class GallerySizes:
    """Search mAP of several systems, as fractions, by gallery.

    `maps` is system -> gallery -> mAP, `galleries` are all of them, the smallest first.
    """

    maps: Mapping[str, Mapping[str, float]]
    galleries: tuple[str, ...]
    references: tuple[Reference, ...] = ()


def gallery_size_plot(sizes: GallerySizes) -> Figure:
    """mAP against gallery size, a curve per system; gaps where a system was not measured.

    The galleries are equally far apart. References are dotted lines from the axis to a hollow mark.
    """
    maps, galleries = sizes.maps, sizes.galleries
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (system, values) in enumerate(maps.items()):
        percent = [100 * values.get(gallery, np.nan) for gallery in galleries]
        axes.plot(percent, marker="o", color=f"C{number}", label=system)
    for number, reference in enumerate(sizes.references, start=len(maps)):
        place, color = galleries.index(reference.gallery), f"C{number}"
        axes.plot([-0.5, place], [reference.mAP] * 2, ":", color=color)
        axes.plot(place, reference.mAP, "D", mfc="white", color=color, label=reference.label)
    axes.set_xticks(range(len(galleries)), galleries)
    axes.set(xlabel="gallery size", ylabel="mAP (%)", xlim=(-0.5, len(galleries) - 0.5))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def precision_recall_plot(
    panels: Mapping[str, Mapping[str, PrecisionRecall]],
) -> Figure:
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


def rendered(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a plot, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
