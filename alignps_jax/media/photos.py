"""Photos as pixels: upright as a viewer shows them, their size checked before they are decoded.

OpenCV decodes JPEG, bit by bit as the released code's data sets had it; Pillow all else.
"""

import io
import logging
import os
import stat
import warnings
from pathlib import Path

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import pillow_heif
from jaxtyping import UInt8

from alignps_jax.errors import blame

Image = UInt8[np.ndarray, "_H _W 3"]  # the sizes of several in one signature need not agree

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")  # EPS runs programs
# No format needs more: colors and opacity in 32 bits, and what cameras and editors add.
_MAX_BYTES_PER_PIXEL, _MAX_METADATA = 16, 64 << 20

pillow_heif.register_heif_opener()
_formats = PIL.Image.registered_extensions().items()
PHOTO_SUFFIXES = tuple(suffix for suffix, name in _formats if name in (*_FORMATS, "MPO"))
# What is wrong with a file is said in our own words, once; its size is checked here.
PIL.Image.MAX_IMAGE_PIXELS = None
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_photo(path: Path, max_pixels: int) -> Image:
    """A photo as a viewer shows it, RGB; UserError if it is damaged or too large."""
    with blame(path):
        return decode_photo(photo_bytes(path, max_pixels), max_pixels)


def photo_bytes(path: str | Path, max_pixels: int) -> bytes:
    """The content of a file, as far as `max_pixels` pixels can need it."""
    regular(path)
    with open(path, "rb") as file:
        return file.read(max_pixels * _MAX_BYTES_PER_PIXEL + _MAX_METADATA)


def regular(path: str | Path) -> os.stat_result:
    """The state of a file; ValueError for a pipe or device, which may never end."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("found no regular file")
    return state


def decode_photo(data: bytes, max_pixels: int, upright: bool = True) -> Image:
    """The pixels of a photo's file, RGB, `upright` by its EXIF orientation or as stored.

    Of an animation it is the first frame; what is transparent is on white. ValueError if it is no
    photo of a known format, damaged, or larger than `max_pixels` (`data.max_pixels`).
    """
    image = opened(data, max_pixels)
    stored = orientation(image)
    pixels = _jpeg(data) if image.format in ("JPEG", "MPO") else np.array(_rgb(image))
    left = orientation(image)  # 1 for TIFF, which Pillow turns when it decodes it
    undone = {6: 8, 8: 6}.get(stored, stored) if left != stored else 1
    return _turned(pixels, left if upright else undone)


def thumbnail(data: bytes, side: int, max_pixels: int) -> Image:
    """`decode_photo` with at most `side` pixels a side, JPEGs in a tenth of the time."""
    image = opened(data, max_pixels)
    image.draft("RGB", (side, side))
    small = _rgb(image)
    small.thumbnail((side, side))
    return _turned(np.array(small), orientation(image))


def opened(data: bytes, max_pixels: int) -> PIL.Image.Image:
    """An image whose pixels are not decoded yet; ValueError as `decode_photo`."""
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # headers may be damaged in any way
        raise ValueError(f"cannot be decoded ({len(data)} bytes), expected a photo") from error
    check_size(*image.size, max_pixels)
    return image


def check_size(width: int, height: int, most: int) -> None:
    """ValueError if a photo or frame has more than `most` pixels."""
    if width * height > most:
        raise ValueError(
            f"found {width}x{height} pixels, expected {most:,} at most (data.max_pixels)"
        )


def orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation by which viewers turn an image, from 1 (as stored) to 8."""
    try:
        found = int(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return 1
    return found if found in range(1, 9) else 1


def orientation_of(path: str | Path) -> int:
    """The EXIF orientation of a photo's file, as `orientation`."""
    with PIL.Image.open(path, formats=_FORMATS) as image:
        return orientation(image)


def lacks_end(data: bytes) -> bool:
    """Whether a file's last JPEG image has no end marker."""
    return data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[data.rfind(b"\xff\xda") :]


def _jpeg(data: bytes) -> Image:
    """Decodes a JPEG; one without end marker if other bytes in place of the end change no pixel."""
    if lacks_end(data):
        data = data.rstrip(b"\0") if data.endswith(bytes(8)) else data  # of a download that was cut
        data = data.rstrip(b"\xff")
        ended, filled = data + b"\xff\xd9", data + b"\xaa" * 64 + b"\xff\xd9"
        if _rgb(PIL.Image.open(io.BytesIO(ended))) != _rgb(PIL.Image.open(io.BytesIO(filled))):
            raise ValueError(f"found a truncated JPEG ({len(data)} bytes), expected a complete one")
        data = ended
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ValueError(f"found a damaged JPEG ({len(data)} bytes)")
    return pixels


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an image of any format; 16 bits by their range, floats from 0 to 1 or their most."""
    try:
        image.load()
        if image.mode[0] in "IF":
            values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            low, high = min(0, values.min()), max(1, values.max())
            low, high = (0, 65535) if image.mode.startswith("I;16") else (low, high)
            gray = np.round((values - low) * (255 / (high - low))).astype(np.uint8)
            return PIL.Image.fromarray(gray).convert("RGB")
        if image.has_transparency_data:
            white = PIL.Image.new("RGBA", image.size, "white")
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # formats fail in many ways
        raise ValueError(f"cannot be decoded ({' '.join(str(error).split())})") from error


def _turned(pixels: Image, orientation: int) -> Image:
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    return np.ascontiguousarray(pixels[::-1] if orientation in (3, 4, 7, 8) else pixels)
