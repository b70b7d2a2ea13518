"""Complete files, whether they could be written, JSON, and pictures."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from alignps_jax.media import Image
from alignps_jax.types import UserError

_MOST_JSON = 1 << 26  # bytes


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write, which becomes `path` when the block ends without an error.

    A reader of `path` sees the old file or the new one, never half of one, even after a power cut.
    The folder is made where needed. An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # a full disk does not say which
        raise


def check_outputs(*paths: Path) -> None:
    """Finds out, before the work, whether its results may be written; leaves nothing behind.

    UserError if a path is a folder or its folder is a file, PermissionError if it is read-only.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: found a folder, expected a file to write or nothing there")
        nearest = next(folder for folder in path.parents if folder.exists())
        if not nearest.is_dir():
            raise UserError(f"{nearest}: found a file, expected a folder for {path.name}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a complete file, as `complete_file` does."""
    with complete_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: object, allow_nan: bool = False) -> None:
    """Writes `content`, indented, as a complete file.

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
    """Writes a PNG or JPEG file (by its suffix), complete or not at all."""
    encoded, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert encoded, f"{path}: {image.shape}"
    write_atomically(path, data.tobytes())
