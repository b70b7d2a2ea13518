"""What `--mode=visualize` draws from: checkpoints or saved results, a query photo, a folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import results_folder
from alignps_jax.inference.detector import Detector
from alignps_jax.log import progress
from alignps_jax.media import Image, Walk, is_video, read_photo
from alignps_jax.types import UserError

Pictures = Iterator[tuple[str, Image | Figure]]  # each with the name of its file, without .png


@dataclasses.dataclass
class FigureRequest:
    """What to draw from.

    `checkpoints` (one at least) are workdirs, folders of a step, or files of results
    (`detections.npz`, `metrics.json`). `config_of` gives the configuration of a checkpoint.
    """

    checkpoints: tuple[Path, ...]
    config_of: Callable[[Path], ConfigDict]
    query: Path | None = None
    box: tuple[float, ...] | None = None
    gallery: Path | None = None

    @property
    def folder(self) -> Path:
        """The first checkpoint, or the folder of the first file."""
        first = self.checkpoints[0]
        return first.parent if first.is_file() else first

    @property
    def config(self) -> ConfigDict:
        """The configuration that says which data set; of several checkpoints the first one's."""
        return self.config_of(self.folder)

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the checkpoints; the paths where two would share one."""
        names = tuple(_label(path.resolve()) for path in self.checkpoints)
        return names if len({*names}) == len(names) else tuple(map(str, self.checkpoints))

    def files(self, name: str) -> dict[str, Path]:
        """By label: the checkpoint itself if it is a file, else the file `name` of its results."""
        return {
            label: path if path.is_file() else results_folder(path) / name
            for label, path in zip(self.labels, self.checkpoints, strict=True)
        }

    def detectors(self) -> Iterator[tuple[str, Detector]]:
        """Every checkpoint's label and detector, one after another."""
        for label, path in zip(self.labels, self.checkpoints, strict=True):
            yield label, Detector.from_checkpoint(path, self.config_of(path))

    def detector(self) -> Detector:
        """The detector of the only checkpoint."""
        if len(self.checkpoints) != 1:
            raise UserError(f"--checkpoint: found {len(self.checkpoints)}, expected one to draw")
        return next(self.detectors())[1]

    def query_photo(self, detector: Detector) -> tuple[str, Image]:
        """The query's name and pixels, no more than the detector's configuration allows."""
        if self.query is None:
            raise UserError("--query: missing, expected the photo to draw")
        return self.query.name, read_photo(self.query, detector.config.data.max_pixels)

    @cached_property
    def _walk(self) -> Walk:
        return Walk([str(self.gallery)])

    def gallery_photos(self, detector: Detector) -> Iterator[tuple[str, Image]]:
        """The photos of the folder, and below it, that can be read, without the query."""
        files = [path for path in self._walk.files if not is_video(path)] if self.gallery else []
        for path in progress(files, desc="photos", unit="photo", disable=not files):
            try:
                if self.query and os.path.samefile(path, self.query):
                    continue
                photo = read_photo(path, detector.config.data.max_pixels)
            except (UserError, OSError) as error:
                self._walk.skipped[path] = str(error)
                continue
            yield os.path.relpath(path, self.gallery), photo

    def report(self) -> None:
        """Lists the photos that could not be read; IncompleteError if there are any."""
        if self.gallery:
            self._walk.report()


def _label(path: Path) -> str:
    if path.name in ("detections.npz", "metrics.json"):
        path = path.parent
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, step {path.name}"
    return path.stem if path.suffix in (".npz", ".json") else path.name
