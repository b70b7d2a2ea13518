"""Detections of many images: laid end to end, saved as one .npz file, and read again."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.files import complete_file
from alignps_jax.types import Detections, GalleryDetections, blame

# The arrays of a file, and the types that they are read as.
_ARRAYS: dict[str, Any] = {"image_names": np.str_, "offsets": np.int64}
_ARRAYS |= dict.fromkeys(("boxes", "scores", "embeddings"), np.float32)
# An embedding this close to length one is taken as it is: float32 rounding, not another scale.
_UNIT_TOLERANCE = 1e-6


def lay_out(names: Sequence[str], found: Sequence[Detections]) -> GalleryDetections:
    """Lays the detections of the images `names`, all of them valid, end to end."""
    return GalleryDetections(
        names=tuple(names),
        offsets=np.cumsum([0, *(len(one.scores) for one in found)], dtype=np.int64),
        boxes=np.concatenate([one.boxes for one in found]),
        scores=np.concatenate([one.scores for one in found]),
        embeddings=np.concatenate([one.embeddings for one in found]),
    )


def save_detections(path: Path, detections: GalleryDetections) -> None:
    """Writes the arrays that `load_detections` reads, as a complete file."""
    arrays = dict(vars(detections))
    arrays["image_names"] = arrays.pop("names")
    with complete_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_detections(path: Path) -> GalleryDetections:
    """Reads an .npz archive of detections; UserError if it is none, or `check_values` refuses it.

    Embeddings are divided by their length; those of length one are returned bit for bit. The rows
    of an image come back best score first (ties keep the file's order).
    """
    with blame(path):
        found = _read(path)
        check_values(found)
    image = np.repeat(np.arange(len(found.names)), np.diff(found.offsets))
    order = np.lexsort((-found.scores, image))
    return dataclasses.replace(
        found,
        boxes=found.boxes[order],
        scores=found.scores[order],
        embeddings=unit_embeddings(found.embeddings)[order],
    )


def _read(path: Path) -> GalleryDetections:
    file = io.BytesIO(path.read_bytes())  # zipfile calls errors of the system bad files
    try:
        archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
        with np.errstate(all="ignore"):  # beyond float32 is infinite, which is refused
            arrays = {name: np.asarray(archive[name], kind) for name, kind in _ARRAYS.items()}
        names = tuple(arrays["image_names"].ravel().tolist())
    except MemoryError:
        raise
    except Exception as error:  # NumPy and zipfile have many kinds for damaged bytes
        raise ValueError(f"is no archive (.npz) of {', '.join(_ARRAYS)} ({error})") from error
    rows, offsets = arrays["scores"].size, arrays["offsets"]
    embeddings = rows, *arrays["embeddings"].shape[1:2]
    shapes = (len(names),), (len(names) + 1,), (rows, 4), (rows,), embeddings
    for (name, array), shape in zip(arrays.items(), shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name}: found the shape {array.shape}, expected {shape}")
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        found = f"{offsets[0]} to {offsets[-1]}"
        raise ValueError(f"offsets: found {found}, expected 0 to {rows}, in ascending order")
    if len(set(names)) < len(names):
        raise ValueError(f"image_names: found {Counter(names).most_common(1)[0][0]!r} twice")
    return GalleryDetections(names, *(arrays[name] for name in list(_ARRAYS)[1:]))


def check_values(detections: GalleryDetections) -> None:
    """Raises ValueError unless all numbers are finite, and boxes have x1 <= x2 and y1 <= y2."""
    boxes, embeddings = detections.boxes, detections.embeddings
    problems = {
        "boxes that are not finite": ~np.isfinite(boxes).all(axis=1),
        "boxes with x2 < x1 or y2 < y1": (boxes[:, 2:] < boxes[:, :2]).any(axis=1),
        "scores that are not finite": ~np.isfinite(detections.scores),
        "embeddings that are not finite": ~np.isfinite(embeddings).all(axis=1),
    }
    for problem, bad in problems.items():
        if bad.any():
            first = detections.names[detections.image_of(int(bad.argmax()))]
            raise ValueError(f"found {bad.sum():,} {problem}, the first in image {first!r}")


def unit_embeddings(embeddings: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M D"]:
    """Embeddings divided by their length, as float32; zeros stay, and so does what has length one.

    What comes out passes through a second time, or through a file, unchanged bit for bit.
    """
    lengths = np.sqrt(np.einsum("md,md->m", embeddings, embeddings, dtype=np.float64))
    lengths[(np.abs(lengths - 1) <= _UNIT_TOLERANCE) | (lengths == 0)] = 1.0
    unit = np.empty(embeddings.shape, np.float32)  # of quotients of 64 bits, a few at a time
    return np.divide(embeddings, lengths[:, None], out=unit, dtype=np.float64, casting="unsafe")


def rows_of_images(
    offsets: Int[np.ndarray, "N_plus_1"], images: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "n_plus_1"]]:
    """Rows of `images` end to end, and the offsets of these images in that list."""
    counts = offsets[images + 1] - offsets[images]
    new_offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = np.arange(new_offsets[-1]) + np.repeat(offsets[images] - new_offsets[:-1], counts)
    return rows, new_offsets
