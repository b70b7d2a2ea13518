"""The pictures of `--mode=visualize`: each kind is one entry of `FIGURES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from alignps_jax.checkpoint.places import results_folder
from alignps_jax.figures import datasets, photos
from alignps_jax.figures.plots import rendered
from alignps_jax.figures.request import FigureRequest, Pictures
from alignps_jax.files import check_outputs, write_image
from alignps_jax.types import UserError


def comparison(request: FigureRequest) -> Pictures:
    """The same queries under several checkpoints (Paper, Fig. 7): in photos, or of the test set."""
    if bool(request.query) != bool(request.gallery):
        raise UserError("--query, --gallery: found one of them, expected both, or neither")
    return (photos if request.query else datasets).comparison(request)


FIGURES: dict[str, Callable[[FigureRequest], Pictures]] = {
    "sampling_points": photos.sampling_points,
    "comparison": comparison,
    "gallery_size": datasets.gallery_size,
    "detections": photos.detections,
    "similarity": photos.similarity,
    "precision_recall": datasets.precision_recall,
    "calibration": datasets.calibration,
}


def draw_figures(kind: str, request: FigureRequest, workdir: Path | None) -> None:
    """Writes the pictures of a kind, an entry of `FIGURES`, as PNG files and prints their paths.

    They go to `workdir`, by default below the results of the first checkpoint.

    Raises:
      IncompleteError: all is drawn, but some photos of the gallery could not be read.
      UserError: what the kind needs is missing, cannot be read or does not fit together.
    """
    workdir = workdir or results_folder(request.folder) / "figures"
    check_outputs(workdir / f"{kind}.png")
    for name, picture in FIGURES[kind](request):
        path = workdir / f"{name}.png"
        write_image(path, rendered(picture) if isinstance(picture, Figure) else picture)
        print(path)
    request.report()
