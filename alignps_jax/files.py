"""Complete files, whether they could be written, JSON, and pictures."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from alignps_jax.media.photos import Image
from alignps_jax.types import UserError

_MOST_JSON = 1 << 26  # bytes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the system in the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write, which becomes `path` when the block ends without an error.

    A reader of `path` sees the old file or the new one, never half of one. The folder is made
    where needed.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# So much of a disk is free where a result is to go, or it counts as full.
_PROBE_BYTES = 4096


def check_outputs(*paths: Path) -> None:
    """Finds out, before the work, whether its results can be written; leaves nothing behind.

    Raises:
        UserError: a path is a folder, its folder is a file, or it cannot be written.
    """
    for path in paths:
        with writing(path):
            _check_output(path)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: found a folder, expected a file to write or nothing there")
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    nearest = path.parents[len(missing)]
    if not nearest.is_dir():
        raise UserError(f"{nearest}: found a file, expected a folder for {path.name}")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(_PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):  # not made after all
            probe.unlink()
        with contextlib.suppress(OSError):  # not made, or somebody else has files there by now
            for folder in missing:
                folder.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a complete file, as `complete_file` does; raises the same."""
    with complete_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: object, allow_nan: bool = False) -> None:
    """Writes `content`, indented, as a complete file; UserError if it cannot be written.

    NaN and infinity, for which JSON has no names, are a ValueError without `allow_nan`.
    """
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=allow_nan) + "\n").encode())


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file that anybody may have written.

    Raises UserError, with what was `expected` there, for a file that holds no JSON or too much.
    """
    if path.stat().st_size > _MOST_JSON:
        raise UserError(f"{path}: found {path.stat().st_size:,} bytes, expected {expected}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found no JSON, expected {expected}") from error


def write_image(path: Path, image: Image) -> None:
    """Writes a PNG or JPEG file (by its suffix), complete or not at all.

    Raises:
        UserError: the suffix is not .png, .jpg or .jpeg, the picture is too large for the format,
            or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: found the suffix {suffix!r}, expected .png, .jpg or .jpeg")
    quality = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    encoded, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    if not encoded:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width}x{height} pixels are too many for {suffix}, try .png")
    write_atomically(path, data.tobytes())
