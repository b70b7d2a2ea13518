"""Everybody in photos and videos as a file for other programs: `--mode=detect`."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.devices import use_compilation_cache
from alignps_jax.evaluation.detections_io import save_detections, unit_embeddings
from alignps_jax.files import check_outputs, complete_file, write_json
from alignps_jax.gallery.query import above
from alignps_jax.gallery.reading import SceneRead, Task, read_scene, video_tasks
from alignps_jax.gallery.sources import MediaFile, media_files, report_skipped
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import detect_all
from alignps_jax.log import progress
from alignps_jax.types import Detections, GalleryDetections, UserError

# An image, the size of its pixels included, and who was found in it.
Found = tuple[SceneRead, Detections]


def detect_source(
    checkpoint: Path, config: ConfigDict, source: str, every: float, target: Path
) -> None:
    """Writes everybody in the photos and videos of a source with at least the score threshold.

    Args:
      checkpoint: of the network.
      config: what to use it with, mostly its own.
      source: a folder, photo or video.
      every: seconds between the frames of a video.
      target: a .json file (images, and results in the format of COCO with a `score`; boxes x, y,
        width, height), a .csv file (x1, y1, x2, y2), or an .npz file as `save_detections` writes
        it. Boxes are in pixels of the photo as a viewer shows it.

    Raises:
      UserError: the checkpoint or source is wrong, or the target cannot be written.
      IncompleteError: all is done, but some files could not be read.
    """
    if target.suffix.lower() not in WRITERS:
        raise UserError(f"--target: found {target}, expected a file {', '.join(WRITERS)}")
    check_outputs(target)
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    skipped: dict[str, str] = {}
    files = list(media_files(source, skipped))
    threshold, found = config.eval.score_threshold, []
    bar = progress(desc="detect", unit="file", total=len(files))
    with bar:
        tasks = _tasks(files, every, config.data.max_pixels)
        for result in detect_all(detector.detect_batch, config.data, detector.rows, tasks):
            read = result.tag
            if result.found is None:
                skipped[read.file.path] = str(result.error)
            else:
                found.append((read, _kept(result.found, threshold, target)))
            bar.update(read.final)
    WRITERS[target.suffix.lower()](target, found)
    people = sum(len(detections.scores) for _, detections in found)
    print(
        f"found {people:,} people (scores >= {threshold:g}) in {len(found):,} photos and frames\n"
        f"detections  {target}"
    )
    report_skipped(skipped, len(files))


def _kept(found: Detections, threshold: float, target: Path) -> Detections:
    """What is written of detections: embeddings are large."""
    people = above(found, threshold)
    if target.suffix.lower() == ".npz":
        return people
    nothing = np.zeros((len(people.scores), 0), np.float32)
    return dataclasses.replace(people, embeddings=nothing)


def _tasks(files: list[MediaFile], every: float, max_pixels: int) -> Iterator[Task]:
    for file in files:
        if file.is_video:
            yield from video_tasks(file, every, max_pixels)
        else:
            yield partial(read_scene, file, max_pixels)


def _name(read: SceneRead) -> str:
    """A photo's path; of a frame with its second."""
    assert read.scene is not None
    second = read.scene.second
    return read.scene.path if second is None else f"{read.scene.path}#t={second:.3f}"


def _write_coco(target: Path, found: list[Found]) -> None:
    images = [
        {
            "id": number,
            "file_name": _name(read),
            "height": read.scene.height if read.scene else 0,
            "width": read.scene.width if read.scene else 0,
        }
        for number, (read, _) in enumerate(found, start=1)
    ]
    boxes = [
        (number, box, score)
        for number, (_, people) in enumerate(found, start=1)
        for box, score in zip(people.boxes.tolist(), people.scores.tolist(), strict=True)
    ]
    annotations = [
        {
            "id": identity,
            "image_id": image,
            "category_id": 1,
            "bbox": [round(x, 3) for x in (x1, y1, x2 - x1, y2 - y1)],
            "area": round((x2 - x1) * (y2 - y1), 3),
            "iscrowd": 0,
            "score": round(score, 6),
        }
        for identity, (image, (x1, y1, x2, y2), score) in enumerate(boxes, start=1)
    ]
    categories = [{"id": 1, "name": "person"}]
    write_json(target, {"images": images, "annotations": annotations, "categories": categories})


def _write_csv(target: Path, found: list[Found]) -> None:
    with complete_file(target) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "second", "x1", "y1", "x2", "y2", "score"))
        for read, people in found:
            assert read.scene is not None
            second = "" if read.scene.second is None else f"{read.scene.second:.3f}"
            for box, score in zip(people.boxes.tolist(), people.scores.tolist(), strict=True):
                numbers = [*(f"{x:.3f}" for x in box), f"{score:.6f}"]
                writer.writerow((read.scene.path, second, *numbers))


def _write_npz(target: Path, found: list[Found]) -> None:
    rows = [people for _, people in found]
    if not rows:
        raise UserError(f"{target}: found no photo to write detections of, expected at least one")
    counts = itertools.accumulate((len(people.scores) for people in rows), initial=0)
    detections = GalleryDetections(
        names=tuple(_name(read) for read, _ in found),
        offsets=np.array(list(counts), np.int64),
        boxes=np.concatenate([people.boxes for people in rows]),
        scores=np.concatenate([people.scores for people in rows]),
        embeddings=unit_embeddings(np.concatenate([people.embeddings for people in rows])),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    save_detections(target, detections)


WRITERS: dict[str, Callable[[Path, list[Found]], None]] = {
    ".json": _write_coco,
    ".csv": _write_csv,
    ".npz": _write_npz,
}
