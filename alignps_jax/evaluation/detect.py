"""Everybody in photos and videos as a file for other programs: `--mode=detect`."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL.ExifTags import Base

from alignps_jax.devices import use_compilation_cache
from alignps_jax.errors import known_name
from alignps_jax.evaluation.detections_io import lay_out, save_detections
from alignps_jax.files import check_outputs, complete_file, write_json
from alignps_jax.gallery.query import above
from alignps_jax.gallery.reading import SceneRead, Task, read_scene, video_tasks
from alignps_jax.gallery.sources import MediaFile, media_files, report_skipped
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import detect_all
from alignps_jax.log import progress
from alignps_jax.types import Detections, UserError


@dataclasses.dataclass(frozen=True)
class Found:
    """The people in a photo or frame, whose size (height, width) and boxes are as stored.

    `name` is its path from the source, `second` its place in a video, `turned` whether a viewer
    turns it.
    """

    name: str
    second: float | None
    size: tuple[int, int]
    turned: bool
    people: Detections

    @property
    def image(self) -> str:
        """The name; of a frame with its second."""
        return self.name if self.second is None else f"{self.name}#t={self.second:.3f}"


def detect_source(
    checkpoint: Path, config: ConfigDict, source: str, every: float, target: Path
) -> None:
    """Writes everybody in the photos and videos of a source with at least the score threshold.

    Photos are named from `source` on, and boxes are in pixels of the photo as stored, without its
    EXIF orientation: as data sets have them.

    Args:
      checkpoint: of the network.
      config: what to use it with, mostly its own.
      source: a folder, photo or video.
      every: seconds between the frames of a video.
      target: a .json file (COCO with a `score`; boxes x, y, width, height), a .csv file (x1, y1,
        x2, y2), or an .npz file as `save_detections` writes it.

    Raises:
      UserError: the checkpoint or source is wrong, or the target cannot be written.
      IncompleteError: all is done, but some files could not be read.
    """
    suffix = known_name(f"--target: suffix of {target}", target.suffix.lower(), WRITERS)
    check_outputs(target)
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    skipped: dict[str, str] = {}
    files = list(media_files(source, skipped))
    threshold, found = config.eval.score_threshold, []
    with progress(desc="detect", unit="file", total=len(files)) as bar:
        tasks = _tasks(files, every, config.data.max_pixels)
        for result in detect_all(detector.detect_batch, config.data, detector.rows, tasks):
            if result.found is None:
                skipped[result.tag.file.path] = str(result.error)
            else:
                people = above(result.found, threshold)
                if suffix != ".npz":  # embeddings are large
                    nothing = np.zeros((len(people.scores), 0), np.float32)
                    people = dataclasses.replace(people, embeddings=nothing)
                found.append(_as_stored(result.tag, people))
            bar.update(result.tag.final)
    if found:
        WRITERS[suffix](target, found)
        count, turned = (sum(len(x.people.scores) for x in found), sum(x.turned for x in found))
        print(
            f"found {count:,} people (scores >= {threshold:g}) in {len(found):,} photos and frames"
        )
        if turned:
            print(f"note: viewers turn {turned:,} of the photos (EXIF); boxes are as stored")
        print(f"detections  {target}")
    report_skipped(skipped, len(files))
    if not found:
        raise UserError(f"--source: found no photo or video in {source}")


def _tasks(files: list[MediaFile], every: float, max_pixels: int) -> Iterator[Task]:
    for file in files:
        if file.is_video:
            yield from video_tasks(file, every, max_pixels)
        else:
            yield partial(read_scene, file, max_pixels)


def _as_stored(read: SceneRead, people: Detections) -> Found:
    file, scene = read.file, read.scene
    assert scene is not None
    orientation = 1 if file.is_video else _orientation(file.path)
    size = scene.height, scene.width
    boxes = boxes_as_stored(np.asarray(people.boxes), size, orientation)
    stored_size = size[::-1] if orientation > 4 else size
    people = dataclasses.replace(people, boxes=boxes)
    return Found(file.name, scene.second, stored_size, orientation > 1, people)


def _orientation(path: str) -> int:
    """The EXIF orientation of a photo, from 1 (as stored) to 8."""
    try:
        with PIL.Image.open(path) as image:
            found = int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return 1
    return found if found in range(1, 9) else 1


def boxes_as_stored(
    boxes: Float[np.ndarray, "K 4"], size: tuple[int, int], orientation: int
) -> Float[np.ndarray, "K 4"]:
    """Boxes of an upright photo of that height and width in the pixels that are stored.

    `orientation` is that of EXIF (2.3, section 4.6.4): from 5 on rows and columns are exchanged.
    """
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation in (2, 3, 6, 7):
        x = size[1] - x[:, ::-1]
    if orientation in (3, 4, 7, 8):
        y = size[0] - y[:, ::-1]
    stored = (y, x) if orientation > 4 else (x, y)
    return np.stack(stored, axis=2).reshape(-1, 4)


def _write_coco(target: Path, found: Sequence[Found]) -> None:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, one in enumerate(found, start=1):
        height, width = one.size
        images.append({"id": number, "file_name": one.image, "height": height, "width": width})
        people = zip(one.people.boxes.tolist(), one.people.scores.tolist(), strict=True)
        for (x1, y1, x2, y2), score in people:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": 1,
                "bbox": [round(x, 3) for x in (x1, y1, x2 - x1, y2 - y1)],
                "area": round((x2 - x1) * (y2 - y1), 3),
                "iscrowd": 0,
                "score": round(score, 6),
            }
            annotations.append(annotation)
    categories = [{"id": 1, "name": "person"}]
    write_json(target, {"images": images, "annotations": annotations, "categories": categories})


def _write_csv(target: Path, found: Sequence[Found]) -> None:
    with complete_file(target) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "second", "x1", "y1", "x2", "y2", "score"))
        for one in found:
            second = "" if one.second is None else f"{one.second:.3f}"
            for box, score in zip(one.people.boxes.tolist(), one.people.scores, strict=True):
                writer.writerow((one.name, second, *(f"{x:.3f}" for x in box), f"{score:.6f}"))


def _write_npz(target: Path, found: Sequence[Found]) -> None:
    save_detections(target, lay_out([one.image for one in found], [one.people for one in found]))


WRITERS: dict[str, Callable[[Path, Sequence[Found]], None]] = {
    ".json": _write_coco,
    ".csv": _write_csv,
    ".npz": _write_npz,
}
