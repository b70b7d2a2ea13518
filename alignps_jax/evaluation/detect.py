"""Everybody in photos and videos as a file for other programs: `--mode=detect`."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.boxes import as_stored
from alignps_jax.devices import use_compilation_cache
from alignps_jax.errors import known_name
from alignps_jax.evaluation.detections_io import lay_out, save_detections
from alignps_jax.files import check_outputs, complete_file, write_json
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import above, detect_all, shot_photo
from alignps_jax.log import progress
from alignps_jax.media import Shot, Walk, exif_of, shots
from alignps_jax.types import Detections, GalleryDetections

# A photo or frame: its name, size (height, width) and people as stored; whether viewers turn it.
Found = tuple[str, tuple[int, int], Detections, bool]


def detect_source(
    checkpoint: Path, config: ConfigDict, source: str, every: float, target: Path
) -> None:
    """Writes everybody in the photos and videos of a source with at least the score threshold.

    Names of photos are relative to `source`. Of a video, one frame is taken every `every` seconds.
    Boxes are in pixels of the photo as stored, without its EXIF orientation, as data sets have
    them. The target is a .json (COCO), a .csv, or an .npz file as `save_detections` writes it.
    IncompleteError if all is done, but some files could not be read.
    """
    suffix = known_name(f"--target: suffix of {target}", target.suffix.lower(), WRITERS)
    check_outputs(target)
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    walk, root = Walk([source]), source if os.path.isdir(source) else os.path.dirname(source)
    threshold, most, found = config.eval.score_threshold, config.data.max_pixels, []
    with progress(desc="detect", unit="file", total=len(walk.files)) as bar:
        read = (task for path in walk.files for task in shots(path, every, most))
        tasks = (partial(shot_photo, task) for task in read)
        for result in detect_all(detector.detect_batch, config.data, detector.rows, tasks):
            if result.error is not None:
                walk.skipped[result.tag.path] = str(result.error)
            elif result.found is not None:
                people = above(result.found, threshold)
                if suffix != ".npz":  # embeddings are large
                    nothing = np.zeros((len(people.scores), 0), np.float32)
                    people = dataclasses.replace(people, embeddings=nothing)
                found.append(_as_stored(result.tag, people, root))
            bar.update(result.tag.second is None)
    if found:
        names, sizes, everybody, turned = zip(*found, strict=True)
        saved = lay_out(names, everybody)
        WRITERS[suffix](target, saved, sizes)
        count = f"{len(saved.scores):,} people (scores >= {threshold:g})"
        print(f"found {count} in {len(found):,} photos and frames")
        if any(turned):
            print(f"note: viewers turn {sum(turned):,} photos (EXIF); boxes are those as stored")
        print(f"detections  {target}")
    walk.report()


def _as_stored(shot: Shot, people: Detections, root: str) -> Found:
    name, turn = os.path.relpath(shot.path, root), 1
    if shot.second is None:
        turn = exif_of(shot.path)["Orientation"]
    else:
        name += f"#t={shot.second:.3f}"
    boxes, size = as_stored(np.asarray(people.boxes), shot.size, turn)
    return name, size, dataclasses.replace(people, boxes=boxes), turn > 1


def _write_coco(target: Path, found: GalleryDetections, sizes: Sizes) -> None:
    images = [
        {"id": number, "file_name": name, "height": height, "width": width}
        for number, (name, (height, width)) in enumerate(zip(found.names, sizes, strict=True), 1)
    ]
    annotations = [
        {
            "id": number,
            "image_id": image + 1,
            "category_id": 1,
            "bbox": [round(x, 3) for x in (x1, y1, x2 - x1, y2 - y1)],
            "area": round((x2 - x1) * (y2 - y1), 3),
            "iscrowd": 0,
            "score": round(score, 6),
        }
        for number, (image, (x1, y1, x2, y2), score) in enumerate(_rows(found), 1)
    ]
    categories = [{"id": 1, "name": "person"}]
    write_json(target, {"images": images, "annotations": annotations, "categories": categories})


def _write_csv(target: Path, found: GalleryDetections, sizes: Sizes) -> None:
    with complete_file(target) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "x1", "y1", "x2", "y2", "score"))
        for image, box, score in _rows(found):
            writer.writerow((found.names[image], *(f"{x:.3f}" for x in box), f"{score:.6f}"))


def _rows(found: GalleryDetections) -> Iterator[tuple[int, list[float], float]]:
    """Number of the image, box and score of each person."""
    images = np.repeat(np.arange(len(found.names)), np.diff(found.offsets))
    return zip(images.tolist(), found.boxes.tolist(), found.scores.tolist(), strict=True)


Sizes = Sequence[tuple[int, int]]
WRITERS: dict[str, Callable[[Path, GalleryDetections, Sizes], None]] = {
    ".json": _write_coco,
    ".csv": _write_csv,
    ".npz": lambda target, found, _: save_detections(target, found),
}
