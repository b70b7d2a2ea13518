"""Photos as pixels: upright as a viewer shows them, their size checked before they are decoded."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import pillow_heif
from jaxtyping import UInt8
from PIL.ExifTags import IFD, TAGS

from alignps_jax.errors import blame

Image = UInt8[np.ndarray, "_H _W 3"]  # the sizes of several in one signature need not agree
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")  # EPS runs programs
_TURNS = [PIL.Image.Transpose(max(0, n)) for n in (-1, -1, 0, 3, 1, 5, 4, 6, 2)]  # by orientation
pillow_heif.register_heif_opener()
_formats = PIL.Image.registered_extensions().items()
PHOTO_SUFFIXES = tuple(suffix for suffix, name in _formats if name in (*_FORMATS, "MPO"))
PIL.Image.MAX_IMAGE_PIXELS = None  # `max_pixels` says it
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_photo(path: str | Path, max_pixels: int, side: int = 0) -> Image:
    """`decode_photo` of a file, upright; UserError if it is damaged or too large."""
    with blame(path):
        return decode_photo(Path(path).read_bytes(), max_pixels, side=side)


def decode_photo(data: bytes, max_pixels: int, upright: bool = True, side: int = 0) -> Image:
    """The pixels of a photo, RGB on white, `upright` by its EXIF orientation or as stored.

    Of an animation it is the first frame. With a `side` it may be smaller, but no side shorter: a
    JPEG in a tenth of the time. ValueError if it is no photo, damaged, or too large.
    """
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data.rpartition(b"\xff\xda")[2]:
        # A JPEG without end is complete if other bytes in place of the end change no pixel.
        rest = data.rstrip(b"\0") if data.endswith(bytes(8)) else data  # of a download that was cut
        ends = (rest.rstrip(b"\xff") + fill + b"\xff\xd9" for fill in (b"", b"\xaa" * 64))
        pixels, other = (decode_photo(one, max_pixels, upright, side) for one in ends)
        if not np.array_equal(pixels, other):
            raise ValueError(f"found a truncated JPEG ({len(data)} bytes)")
        return pixels
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"found {image.width}x{image.height} pixels, most is {max_pixels:,}")
        if side:
            image.draft("RGB", (side, side))
        is_turned = image.format == "TIFF"  # when Pillow loads it
        turn = exif_of(io.BytesIO(data))["Orientation"] if upright != is_turned else 1
        turn = {6: 8, 8: 6}.get(turn, turn) if is_turned else turn
        rgb = _rgb(image)
        return np.array(rgb.transpose(_TURNS[turn]) if turn > 1 else rgb)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # formats fail in many ways
        raise ValueError(f"cannot be decoded ({len(data)} bytes), expected a photo") from error


def exif_of(file: str | Path | IO[bytes]) -> dict[str, Any]:
    """The EXIF tags of a photo by their names; an Orientation from 1 (as stored) to 8 always."""
    image, tags = PIL.Image.open(file, formats=_FORMATS), dict[str, Any]()
    with contextlib.suppress(Exception):  # EXIF data are damaged where the photo is not
        exif = image.getexif()
        tags = {TAGS.get(tag, ""): said for tag, said in {**exif, **exif.get_ifd(IFD.Exif)}.items()}
    return tags if tags.get("Orientation") in range(1, 9) else tags | {"Orientation": 1}


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any format as RGB: 16 bits by their range, floats from 0 to 1 or their most."""
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        most = 65535 if image.mode.startswith("I;16") else max(1, values.max())
        image = PIL.Image.fromarray(np.round(values * (255 / most)).astype(np.uint8))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
