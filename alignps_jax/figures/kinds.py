"""The pictures of `--mode=visualize`: each kind is one entry of `FIGURES`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import results_folder
from alignps_jax.drawing.rankings import ranking_picture
from alignps_jax.figures import datasets as dataset_figures
from alignps_jax.figures import photos as photo_figures
from alignps_jax.figures.plots import gallery_size_plot, precision_recall_plot, rendered
from alignps_jax.files import check_outputs, write_image
from alignps_jax.gallery.photos import GalleryReader, gallery_photos
from alignps_jax.gallery.query import parse_box
from alignps_jax.inference.detector import Detector
from alignps_jax.media.photos import Image, read_photo
from alignps_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class FigureRequest:
    """What to draw from, and the folder that takes the pictures.

    `checkpoints` (one at least) are workdirs or folders of a step; figures of a whole data set
    read the `detections.npz` or `metrics.json` there, or are given such files themselves.
    `config_of` gives the configuration to use one of the checkpoints with, `load` its detector.
    """

    checkpoints: tuple[Path, ...]
    config_of: Callable[[Path], ConfigDict]
    query: Path | None
    box: tuple[float, ...] | None
    gallery: Path | None
    workdir: Path
    load: Callable[[Path, ConfigDict], Detector] = Detector.from_checkpoint

    def detectors(self) -> Iterator[tuple[str, Detector]]:
        """Every checkpoint's label and detector, one after another."""
        names = dataset_figures.labels(self.checkpoints)
        for label, path in zip(names, self.checkpoints, strict=True):
            yield label, self.load(path, self.config_of(path))

    def detector(self) -> Detector:
        """The detector of the only checkpoint."""
        if len(self.checkpoints) != 1:
            raise UserError(
                f"--checkpoint: found {len(self.checkpoints)} of them, expected one for this --what"
            )
        return next(self.detectors())[1]

    def query_photo(self, detector: Detector) -> tuple[Path, Image]:
        """The query's path and pixels, no more than the detector's configuration allows."""
        if self.query is None:
            raise UserError("--query: missing, expected the photo to draw")
        return self.query, read_photo(self.query, detector.config.data.max_pixels)

    def scenes(self) -> list[Path]:
        """The photos of the gallery but the query, in the order of their names; () without one."""
        return gallery_photos(self.gallery, self.query or Path()) if self.gallery else []


Pictures = Iterator[tuple[str, Image]]


def figure_request(
    checkpoints: str,
    config_of: Callable[[Path], ConfigDict],
    query: str | None,
    box: str | None,
    gallery: str | None,
    workdir: str | None,
) -> FigureRequest:
    """The request of a command line, whose flags these are as they stand there.

    Raises:
      UserError: `checkpoints` is not a list A,B,... or `box` not four numbers.
    """
    names = checkpoints.split(",")
    if not all(names):
        raise UserError(f"--checkpoint: found {checkpoints!r}, expected folders or files A,B,...")
    paths = tuple(Path(name) for name in names)
    return FigureRequest(
        checkpoints=paths,
        config_of=config_of,
        query=Path(query) if query else None,
        box=parse_box(box),
        gallery=Path(gallery) if gallery else None,
        workdir=Path(workdir) if workdir else results_folder(_folder(paths[0])) / "figures",
    )


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def draw_figures(kind: str, request: FigureRequest) -> None:
    """Writes the pictures of a kind, an entry of `FIGURES`, as PNG files and prints their paths.

    Raises:
      IncompleteError: all is drawn, but some photos of the gallery could not be read.
      UserError: what the kind needs is missing, cannot be read or does not fit together; the
        kind does not read what was given; or the folder cannot be written.
    """
    for name in ("query", "box", "gallery"):
        if getattr(request, name) is not None and name not in FIGURES[kind].reads:
            raise UserError(f"--{name}: --what={kind} does not read it")
    if request.box is not None and request.query is None:
        raise UserError("--query: missing, expected the photo that --box is in")
    check_outputs(request.workdir / f"{kind}.png")
    for name, picture in FIGURES[kind].draw(request):
        path = request.workdir / f"{name}.png"
        write_image(path, picture)
        print(path)


def _sampling_points(request: FigureRequest) -> Pictures:
    """Where the deformable convolutions look (Paper, Fig. 5)."""
    detector = request.detector()
    path, photo = request.query_photo(detector)
    picture = photo_figures.sampling_points_picture(detector, path, photo, request.box)
    yield f"sampling_points-{path.stem}", picture


def _detections(request: FigureRequest) -> Pictures:
    """Everybody found in a photo, in each photo of a folder, or in both."""
    if not request.query and not request.gallery:
        raise UserError("--query: missing, expected a photo (or a folder as --gallery) to draw")
    scenes, reader = request.scenes(), GalleryReader()
    detector = request.detector()
    photos = reader.read(scenes, detector.config.data.max_pixels)
    if request.query:
        photos = itertools.chain([request.query_photo(detector)], photos)
    for path, photo in photos:
        yield f"detections-{path.name}", photo_figures.detections_picture(detector, path, photo)
    reader.finish()


def _similarity(request: FigureRequest) -> Pictures:
    """Heat maps: how similar every location's embedding is to the query's."""
    detector = request.detector()
    path, photo = request.query_photo(detector)
    reader = GalleryReader()
    picture = photo_figures.similarity_picture(
        detector, path, photo, request.box, request.scenes(), reader
    )
    yield f"similarity-{path.stem}", picture
    reader.finish()


def _comparison(request: FigureRequest) -> Pictures:
    """The same queries under several checkpoints (Paper, Fig. 7)."""
    if len(request.checkpoints) < 2:
        raise UserError("--checkpoint: found one, expected A,B or A,B,C: those to compare")
    if request.query is None:
        if request.gallery is not None:
            raise UserError("--query: missing, expected the person to find in --gallery")
        queries = dataset_figures.compared_queries(_data_config(request), request.checkpoints)
        yield f"comparison-{queries.protocol}", ranking_picture(queries.rows)
        return
    if request.gallery is None:
        raise UserError("--gallery: missing, expected the folder of photos to search")
    reader = GalleryReader()
    picture = photo_figures.comparison_picture(
        request.detectors(), request.query, request.box, request.gallery, reader
    )
    yield f"comparison-{request.query.stem}", picture
    reader.finish()


def _gallery_size(request: FigureRequest) -> Pictures:
    """mAP against gallery size (Paper, Fig. 8)."""
    sizes = dataset_figures.gallery_sizes(request.checkpoints)
    yield "gallery_size", rendered(gallery_size_plot(sizes))


def _precision_recall(request: FigureRequest) -> Pictures:
    """Precision-recall curves of detection, and of search under each protocol."""
    panels = dataset_figures.precision_recall(_data_config(request), request.checkpoints)
    yield "precision_recall", rendered(precision_recall_plot(panels))


def _data_config(request: FigureRequest) -> ConfigDict:
    """The configuration that says which data set; of several checkpoints the first one's."""
    return request.config_of(_folder(request.checkpoints[0]))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A kind of picture: how it is drawn, and which of query, box and gallery it reads."""

    draw: Callable[[FigureRequest], Pictures]
    reads: tuple[str, ...] = ()


FIGURES: dict[str, Figure] = {
    "sampling_points": Figure(_sampling_points, ("query", "box")),
    "comparison": Figure(_comparison, ("query", "box", "gallery")),
    "gallery_size": Figure(_gallery_size),
    "detections": Figure(_detections, ("query", "gallery")),
    "similarity": Figure(_similarity, ("query", "box", "gallery")),
    "precision_recall": Figure(_precision_recall),
}
