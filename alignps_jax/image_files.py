"""Photos in files: how large they say they are, and whether to believe and decode them.

A few hundred bytes can promise pixels for which no machine has the memory, so the size is read
before anything is decoded, and where the decoders read it (JPEG: ITU-T T.81, B.2.2; PNG: W3C
recommendation, 11.2.2; WebP: RFC 9649; TIFF: revision 6.0, section 2). Other formats are refused.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from alignps_jax.types import UserError

# What is wrong with a file is said in our own words, once.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

FORMATS = "JPEG, PNG, BMP, WebP or TIFF"

# No format needs more: colors and opacity in 16 bits, and what cameras and editors add.
_MAX_BYTES_PER_PIXEL, _MAX_METADATA = 8, 64 << 20

_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG = b"\xff\xd8"
_END = 0xD9
# Frames of every kind of coding; the three others of this range are tables.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ORIENTATION = 256, 257, 274


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """The format of an image and its size in pixels as stored, whatever its EXIF data say."""

    format: str
    height: int
    width: int


def read_header(data: bytes) -> ImageHeader | None:
    """The header of an image file; None if it is of none of `FORMATS`, or ends within it."""
    try:
        return _header(data)
    except (struct.error, IndexError):
        return None


def read_photo(path: Path, max_pixels: int) -> tuple[bytes, ImageHeader]:
    """A photo's file, which is complete and may be decoded, and its header.

    Raises:
      UserError: it cannot be read, is no image of `FORMATS`, has more than `max_pixels` pixels
        (`data.max_pixels`), or is a JPEG that lacks pixels.
    """
    try:
        # Not a pipe, which may never end.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: is no file; expected an image")
        with path.open("rb") as file:
            largest = max_pixels * _MAX_BYTES_PER_PIXEL + _MAX_METADATA
            data = file.read(min(os.fstat(file.fileno()).st_size, largest))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected an image") from error
    header = read_header(data)
    if header is None:
        raise not_decodable(str(path), data)
    if header.height * header.width > max_pixels:
        raise UserError(
            f"{path}: has {header.width}x{header.height} pixels; expected at most "
            f"{max_pixels:,} in all (data.max_pixels)"
        )
    # Decoders fill up what is missing of a JPEG with gray; the other formats they refuse.
    if header.format == "JPEG" and lacks_end(data) and _decode_unended(data) is None:
        raise UserError(f"{path}: truncated JPEG ({len(data)} bytes); expected a complete one")
    return data, header


def decode_photo(
    data: bytes, header: ImageHeader, name: str, *, upright: bool
) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file, RGB (gray ones get three equal channels).

    Args:
      data: the content of the file.
      header: its header, whose size is not too large.
      name: what to call it in the error.
      upright: turned as its EXIF orientation says (else as stored).

    Raises:
      UserError: the file is damaged.
    """
    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    if header.format == "TIFF" and not upright:
        data = _without_orientation(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise not_decodable(name, data) from error
    if image is None and header.format == "JPEG":
        image = _decode_unended(data, flags)
    size = (header.height, header.width)
    if image is None or image.shape not in ((*size, 3), (*size[::-1], 3))[: 1 + upright]:
        raise not_decodable(name, data)
    return image


def not_decodable(name: str, data: bytes) -> UserError:
    """The error for a file that is no complete image."""
    return UserError(
        f"{name}: cannot be decoded ({len(data)} bytes); expected a complete {FORMATS} image"
    )


def _header(data: bytes) -> ImageHeader | None:
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data.startswith(_PNG):
        width, height = struct.unpack_from(">II", data, 16)
        return ImageHeader("PNG", height, width)
    if data.startswith(b"BM"):
        return _bmp(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in _TIFF_ORDERS:
        return _tiff(data, _TIFF_ORDERS[data[:4]])
    return None


def _jpeg(data: bytes) -> ImageHeader | None:
    for marker, position in _markers(data):
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return ImageHeader("JPEG", height, width)
    return None


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG file and where each stands.

    Segments are jumped over by their length, so that those of a thumbnail in one do not count.
    """
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 1:
        marker = data[position + 1]
        yield marker, position
        if marker == 0xFF:  # filling before a marker
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= _END:  # without length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _bmp(data: bytes) -> ImageHeader:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", data, 18)
    # A negative height means that the first row is the upper one.
    return ImageHeader("BMP", abs(height), abs(width))


def _webp(data: bytes) -> ImageHeader | None:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return ImageHeader("WebP", height, width)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return ImageHeader("WebP", height, width)
    return None


def _tiff(data: bytes, order: str) -> ImageHeader | None:
    """The size of the first image, which is the one that is decoded."""
    sides: dict[int, int] = {}
    for position, tag, kind, values in _tiff_entries(data, order):
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT):
            if tag in sides or values != 1 or kind not in (3, 4):
                return None
            number = order + ("H" if kind == 3 else "I")
            (sides[tag],) = struct.unpack_from(number, data, position + 8)
    if len(sides) < 2:
        return None
    return ImageHeader("TIFF", sides[_TIFF_HEIGHT], sides[_TIFF_WIDTH])


def _tiff_entries(data: bytes, order: str) -> Iterator[tuple[int, int, int, int]]:
    """(position, tag, type, count) of each entry about the first image."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for position in range(start + 2, start + 2 + 12 * count, 12):
        yield position, *struct.unpack_from(f"{order}HHI", data, position)


def _without_orientation(data: bytes) -> bytes:
    """A TIFF file that is as its pixels are stored: OpenCV turns every other one."""
    order, changed = _TIFF_ORDERS[data[:4]], bytearray(data)
    for position, tag, *_ in _tiff_entries(data, order):
        if tag == _TIFF_ORIENTATION:
            struct.pack_into(f"{order}H", changed, position + 8, 1)
    return bytes(changed)


def lacks_end(data: bytes) -> bool:
    """Whether the end marker of a file's (first) JPEG image is missing.

    Within coded data 0xFF is a marker unless 0x00 or a restart number follows. Whatever a camera
    appends after the end does not matter.
    """
    return not any(marker == _END for marker, _ in _markers(data))


def _decode_unended(
    data: bytes, flags: int = cv2.IMREAD_COLOR
) -> UInt8[np.ndarray, "H W 3"] | None:
    """The pixels of a JPEG without end marker; None if some are missing.

    None are if other bytes in place of the missing ones change nothing.
    """
    coded = data.rstrip(b"\0")  # of a download that was cut
    coded = (data if len(data) - len(coded) < 8 else coded).rstrip(b"\xff")
    ends = (coded + filling + b"\xff\xd9" for filling in (b"", b"\xaa" * 64))
    plain, filled = (cv2.imdecode(np.frombuffer(end, np.uint8), flags) for end in ends)
    if plain is None or filled is None or not np.array_equal(plain, filled):
        return None
    return plain
