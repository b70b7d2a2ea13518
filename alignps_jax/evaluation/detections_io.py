"""Gallery detections on disk (one .npz), and the checks that every reader of them relies on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from alignps_jax.files import complete_file
from alignps_jax.npz_files import Field, read_npz
from alignps_jax.types import GalleryDetections, UserError

_FIELDS = {
    "image_names": Field(1, "U", "[N] text"),
    "offsets": Field(1, "iu", "[N + 1] integers"),
    "boxes": Field(2, "fiu", "[M, 4] numbers"),
    "scores": Field(1, "fiu", "[M] numbers"),
    "embeddings": Field(2, "fiu", "[M, D] numbers"),
}
# An embedding this close to length one is taken as it is: float32 rounding, not another scale.
_UNIT_TOLERANCE = 1e-6
# Rows that are normalized at a time.
_ROWS = 1 << 16


def save_detections(path: str | os.PathLike[str], detections: GalleryDetections) -> None:
    """Writes `detections` to `path`, complete or not at all.

    The file holds `image_names` [N] text, `offsets` [N + 1] int64, `boxes` [M, 4] float32 (x1, y1,
    x2, y2 in the photo's pixels), `scores` [M] float32 and `embeddings` [M, D] float32.

    Raises:
      UserError: the detections are not valid (`check_detections`), the folder does not exist or
        the file cannot be written.
    """
    path = Path(path)
    check_detections(detections, str(path))
    if not path.parent.is_dir():
        raise UserError(f"{path}: folder {path.parent} does not exist; expected an existing folder")
    with complete_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            image_names=np.array(detections.names, dtype=np.str_),
            offsets=detections.offsets.astype(np.int64),
            boxes=detections.boxes.astype(np.float32),
            scores=detections.scores.astype(np.float32),
            embeddings=detections.embeddings.astype(np.float32),
        )


def load_detections(path: str | os.PathLike[str]) -> GalleryDetections:
    """Reads what `save_detections` wrote, or an equal file of another program.

    Embeddings may have any scale and are divided by their length; those of length one are
    returned bit for bit. The rows of an image come back best score first (ties keep the file's
    order). Arrays besides the five are ignored.

    Raises:
      UserError: no such file, not an .npz archive or a damaged one, an array that is missing,
        holds Python objects or has the wrong type or shape, or values that `check_detections`
        or the normalization refuses (NaN, inverted boxes, offsets out of order, zero embeddings).
    """
    path = Path(path)
    arrays = read_npz(path, _FIELDS)
    # Values beyond float32 become infinite here and are refused by name below.
    with np.errstate(over="ignore"):
        boxes, scores, embeddings = (
            arrays.pop(name).astype(np.float32, copy=False)
            for name in ("boxes", "scores", "embeddings")
        )
    raw = GalleryDetections(
        names=_names(arrays["image_names"], path),
        offsets=arrays["offsets"].astype(np.int64),
        boxes=boxes,
        scores=scores,
        embeddings=embeddings,
    )
    _check_layout(raw, str(path))
    _check_values(raw, str(path))
    image = np.repeat(np.arange(len(raw.names)), np.diff(raw.offsets))
    order = np.lexsort((-raw.scores, image))
    return GalleryDetections(
        names=raw.names,
        offsets=raw.offsets,
        boxes=raw.boxes[order],
        scores=raw.scores[order],
        embeddings=_normalized(raw, str(path))[order],
    )


def check_detections(detections: GalleryDetections, where: str) -> None:
    """Says whether `detections` is what its type promises; `where` opens the message.

    Raises:
      UserError: naming the first image concerned: shapes that do not fit together, image names
        that repeat, offsets that do not lead from 0 up to M, boxes or scores or embeddings that
        are not finite, boxes with x2 < x1 or y2 < y1, embeddings of a length
        other than one (to 1e-3) or zero.
    """
    _check_layout(detections, where)
    _check_values(detections, where)
    # A network that has collapsed gives zeros: similar to nobody, but no reason to stop training.
    lengths = _lengths(detections.embeddings)
    off_unit = (np.abs(lengths - 1) > 1e-3) & (lengths > 0)
    _refuse_rows(detections, off_unit, where, "embeddings", "an embedding of length other than one")


def align_detections(
    detections: GalleryDetections, names: Sequence[str], where: str
) -> GalleryDetections:
    """The detections of the images `names`, in that order; other images are left out.

    Raises:
      UserError: naming the first of `names` that `detections` does not have.
    """
    if detections.names == tuple(names):
        return detections
    position = {name: index for index, name in enumerate(detections.names)}
    missing = next((name for name in names if name not in position), None)
    if missing is not None:
        raise UserError(
            f"{where}: image {missing!r} has no entry among the {len(position)} images with "
            "detections; expected every image of the split"
        )
    images = np.array([position[name] for name in names], dtype=np.int64)
    rows, offsets = rows_of_images(detections.offsets, images)
    return GalleryDetections(
        names=tuple(names),
        offsets=offsets,
        boxes=detections.boxes[rows],
        scores=detections.scores[rows],
        embeddings=detections.embeddings[rows],
    )


def unit_embeddings(embeddings: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M D"]:
    """Embeddings divided by their length, as float32; zeros stay, and so does what has length one.

    What comes out passes through a second time, or through a file, unchanged bit for bit.
    """
    lengths = _lengths(embeddings)
    lengths[(np.abs(lengths - 1) <= _UNIT_TOLERANCE) | (lengths == 0)] = 1.0
    unit = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(unit), _ROWS):  # the quotients have 64 bits
        rows = slice(start, start + _ROWS)
        unit[rows] = embeddings[rows] / lengths[rows, None]
    return unit


def rows_of_images(
    offsets: Int[np.ndarray, "N_plus_1"], images: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "n_plus_1"]]:
    """Rows of `images` end to end, and the offsets of these images in that list."""
    counts = offsets[images + 1] - offsets[images]
    new_offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = np.arange(new_offsets[-1]) + np.repeat(offsets[images] - new_offsets[:-1], counts)
    return rows, new_offsets


def _names(stored: np.ndarray, path: Path) -> tuple[str, ...]:
    try:
        return tuple(stored.tolist())
    except (ValueError, SystemError) as error:  # four bytes that are no character
        raise UserError(f"{path}: array 'image_names' holds what is no text") from error


def _check_layout(detections: GalleryDetections, where: str) -> None:
    images, rows = len(detections.names), len(detections.scores)
    offsets = detections.offsets
    shapes = {
        "offsets": (offsets.shape, (images + 1,)),
        "boxes": (detections.boxes.shape, (rows, 4)),
        "scores": (detections.scores.shape, (rows,)),
        "embeddings": (detections.embeddings.shape[:1], (rows,)),
    }
    for field, (found, expected) in shapes.items():
        if found != expected:
            raise UserError(
                f"{where}: {field} has shape {found}; expected {expected} "
                f"for {images} images and {rows} detections"
            )
    if detections.embeddings.ndim != 2 or detections.embeddings.shape[1] == 0:
        raise UserError(
            f"{where}: embeddings has shape {detections.embeddings.shape}; expected [M, D], D > 0"
        )
    if offsets[0] != 0 or offsets[-1] != rows:
        raise UserError(
            f"{where}: offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {rows}"
        )
    falls = offsets[1:] < offsets[:-1]  # a difference could overflow
    if falls.any():
        image = int(np.argmax(falls))
        raise UserError(
            f"{where}: offsets fall from {offsets[image]} to {offsets[image + 1]} at image "
            f"{detections.names[image]!r}; expected offsets that never decrease"
        )
    if len(set(detections.names)) != images:
        repeated = Counter(detections.names).most_common(1)[0][0]
        raise UserError(f"{where}: image name {repeated!r} occurs twice; expected each name once")


def _check_values(detections: GalleryDetections, where: str) -> None:
    boxes = detections.boxes
    for field, bad in (
        ("boxes", ~np.isfinite(boxes).all(axis=1)),
        ("scores", ~np.isfinite(detections.scores)),
        ("embeddings", ~np.isfinite(detections.embeddings).all(axis=1)),
    ):
        _refuse_rows(detections, bad, where, field, "a value that is not finite")
    inverted = np.any(boxes[:, 2:] < boxes[:, :2], axis=1)
    _refuse_rows(detections, inverted, where, "boxes", "a box with x2 < x1 or y2 < y1")


def _refuse_rows(
    detections: GalleryDetections,
    bad: Bool[np.ndarray, "M"],
    where: str,
    field: str,
    what: str,
) -> None:
    if not bad.any():
        return
    row = int(np.argmax(bad))
    image = int(np.searchsorted(detections.offsets, row, side="right")) - 1
    raise UserError(
        f"{where}: {field} has {what} at row {row} (image {detections.names[image]!r}); "
        f"{int(bad.sum())} of {bad.size} rows are like that, expected none"
    )


def _lengths(embeddings: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M"]:
    return np.sqrt(np.einsum("md,md->m", embeddings, embeddings, dtype=np.float64))


def _normalized(detections: GalleryDetections, where: str) -> Float[np.ndarray, "M D"]:
    zeros = _lengths(detections.embeddings) == 0
    _refuse_rows(detections, zeros, where, "embeddings", "an embedding of zeros")
    return unit_embeddings(detections.embeddings)
