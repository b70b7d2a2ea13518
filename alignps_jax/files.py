"""Complete files, and photos."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from alignps_jax.types import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file as a whole, making its folder where needed.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, content: object) -> None:
    """Writes `content`, indented, as a whole; UserError if the file cannot be written."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


Image = UInt8[np.ndarray, "H W 3"]


def read_image(path: Path) -> Image:
    """Reads a user's photo as a viewer shows it, with the EXIF orientation applied.

    Raises:
        UserError: the file cannot be read, is not an image, or ends before the image does.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # Decoders fill up what is missing of a JPEG with grey; the other formats they refuse.
    if data.startswith(b"\xff\xd8") and not _jpeg_is_complete(data):
        raise UserError(f"{path}: the JPEG file is truncated ({len(data)} bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        raise UserError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise UserError(f"{path}: found no complete image, expected a JPEG, PNG or similar file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether the end marker of a file's (first) JPEG image is there.

    Segments are jumped over by their length, so that the end of a thumbnail within one does not
    count; within coded data 0xFF is a marker unless 0x00 or a restart number follows. Whatever
    a camera appends after the end does not matter.
    """
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 1:
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # filling before a marker
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # without length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def write_image(path: Path, image: Image) -> None:
    """Writes a PNG or JPEG file (by its suffix), as a whole or not at all.

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
