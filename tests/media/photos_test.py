"""Photos of all formats as a viewer shows them, limits that hold before decoding, and damage."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pillow_heif  # noqa: F401 (Pillow writes HEIC with it)
import pytest

from alignps_jax.errors import UserError
from alignps_jax.media import photos
from alignps_jax.media.photos import decode_photo, lacks_end, opened, read_photo, thumbnail
from tests.places import SHARED

MOST = 10**6
SECOND = {"save_all": True, "append_images": [PIL.Image.new("RGB", (96, 64))]}
FORMATS = {
    "jpeg": ("JPEG", "RGB", {"quality": 95}),
    "progressive": ("JPEG", "RGB", {"quality": 95, "progressive": True}),
    "gray jpeg": ("JPEG", "L", {}),
    "cmyk": ("JPEG", "CMYK", {}),
    "mpo": ("MPO", "RGB", SECOND),
    "png": ("PNG", "RGB", {}),
    "palette": ("PNG", "P", {}),
    "bits": ("PNG", "1", {}),
    "gif": ("GIF", "RGB", SECOND),
    "bmp": ("BMP", "RGB", {}),
    "webp": ("WEBP", "RGB", {"quality": 95}),
    "animated webp": ("WEBP", "RGB", SECOND),
    "tiff": ("TIFF", "RGB", {}),
    "lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "big tiff": ("TIFF", "RGB", {"big_tiff": True}),
    "heic": ("HEIF", "RGB", {"quality": 95}),
    "avif": ("AVIF", "RGB", {"quality": 95}),
}


def picture(height=64, width=96, seed=0):
    colors = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return colors.repeat(16, axis=0).repeat(16, axis=1)


def encoded(kind, pixels=None, **more):
    file_format, mode, options = FORMATS[kind]
    data = io.BytesIO()
    image = PIL.Image.fromarray(picture() if pixels is None else pixels).convert(mode)
    image.save(data, file_format, **options, **more)
    return data.getvalue()


def bomb(width, height):
    """A PNG file of 57 bytes that promises so many pixels."""
    chunks = (b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0", b"IDAT")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind):
    _, mode, options = FORMATS[kind]
    data, found = encoded(kind), decode_photo(encoded(kind), 96 * 64)
    expected = np.asarray(PIL.Image.fromarray(picture()).convert(mode).convert("RGB"), int)
    assert (found.dtype, found.flags.writeable) == (np.uint8, True)
    if "jpeg" in kind:  # as data sets have them
        opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(found, opencv)
    assert np.abs(found - expected).mean() < (20 if kind in ("palette", "gif") else 5)
    small = cv2.resize(found, (24, 16), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(thumbnail(data, 24, 96 * 64) - small).mean() < 25
    with pytest.raises(ValueError, match="found 96x64 pixels"):
        decode_photo(data, 96 * 64 - 1)
    for share in (0.0, 0.1, 0.2) if options == SECOND else (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"truncated|cannot be decoded"):
            decode_photo(data[: int(share * len(data))], MOST)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "lzw", "heic", "avif"])
def test_orientation_as_stored_or_upright(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif.tobytes())
    shown = PIL.Image.fromarray(picture())
    shown.getexif()[0x0112] = orientation
    shown = np.asarray(PIL.ImageOps.exif_transpose(shown), int)
    # HEIC has turns of its own: what is stored is not for data sets.
    stored = shown if kind == "heic" else picture().astype(int)
    for upright, expected in ((True, shown), (False, stored)):
        found = decode_photo(data, MOST, upright)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 6
    assert thumbnail(data, 24, MOST).shape[:2] == (shown.shape[0] // 4, shown.shape[1] // 4)
    assert photos.orientation(opened(data, MOST)) == (1 if kind == "heic" else orientation)


@pytest.mark.parametrize(
    ("file_format", "kind", "values", "expected"),
    [
        ("PNG", np.uint16, [0, 257, 65535], [0, 1, 255]),
        ("TIFF", np.uint16, [0, 257, 65535], [0, 1, 255]),
        ("TIFF", np.int32, [0, 100, 2000], [0, 13, 255]),
        ("TIFF", np.float32, [0, 0.5, 1], [0, 128, 255]),
        ("TIFF", np.float32, [0, 50, 100], [0, 128, 255]),
        ("TIFF", np.float32, [-1, 0, np.nan, 1, np.inf], [0, 128, 128, 255, 128]),
    ],
)
def test_more_than_8_bits(file_format, kind, values, expected):
    data = io.BytesIO()
    PIL.Image.fromarray(np.array([values], kind)).save(data, file_format)
    found = decode_photo(data.getvalue(), MOST)
    np.testing.assert_array_equal(found, np.repeat(np.array([expected])[..., None], 3, axis=-1))
    colors = picture()[..., ::-1].astype(np.uint16) * 257
    data = cv2.imencode(f".{file_format.lower()}", colors)[1].tobytes()
    np.testing.assert_array_equal(decode_photo(data, MOST), picture())


def test_what_is_transparent_is_white():
    pixels = np.dstack([picture(), np.full((64, 96), 255, np.uint8)])
    pixels[:32, :, 3], pixels[32:48, :, 3] = 0, 51
    for file_format in ("PNG", "WEBP"):
        data = io.BytesIO()
        PIL.Image.fromarray(pixels).save(data, file_format, lossless=True)
        found = decode_photo(data.getvalue(), MOST)
        assert (found[:32] == 255).all()
        np.testing.assert_allclose(found[32:48], 204 + 0.2 * picture()[32:48], atol=1)
        np.testing.assert_array_equal(found[48:], picture()[48:])


def test_a_jpeg_without_end_marker_is_complete_if_all_pixels_are_there():
    data = encoded("jpeg", np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    expected = decode_photo(data, MOST)
    assert not lacks_end(data + b"camera\xff\xd8 notes \xff" * 10)
    for missing in (1, 2):
        assert lacks_end(data[:-missing])
        np.testing.assert_array_equal(decode_photo(data[:-missing], MOST), expected)
    for missing in (4, 5, 9, 60, len(data) // 2):
        for rest in (b"", bytes(100)):  # downloads fill up with zeros
            with pytest.raises(ValueError, match="truncated JPEG"):
                decode_photo(data[:-missing] + rest, MOST)
    # The end of a thumbnail within does not count.
    inner, outer = encoded("jpeg", picture(32, 48)), encoded("jpeg")
    whole = outer[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + outer[2:]
    np.testing.assert_array_equal(decode_photo(whole, MOST), decode_photo(outer, MOST))
    with pytest.raises(ValueError, match="truncated"):
        decode_photo(whole[:-100], MOST)


def test_a_bomb_is_refused_before_it_is_decoded():
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"found 50000x50000 pixels, expected 100,000,000 at most"):
        decode_photo(bomb(50_000, 50_000), 10**8)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("file_format", ["EPS", "PPM", "TGA", "JPEG2000", "ICO", "PDF"])
def test_other_formats_are_refused(file_format):
    data = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(data, file_format)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_photo(data.getvalue(), MOST)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "link.jpg", "."):
        with pytest.raises(UserError, match=r"found no regular file"):
            read_photo(tmp_path / name, MOST)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        read_photo(tmp_path / "gone.jpg", MOST)
    (tmp_path / "large.jpg").write_bytes(encoded("jpeg"))
    os.truncate(tmp_path / "large.jpg", 1 << 40)
    assert len(photos.photo_bytes(tmp_path / "large.jpg", 96 * 64)) < 1 << 27


def test_libraries_keep_silent(tmp_path):
    """No line of theirs on the terminal: a damaged checksum, a cut file, EXIF data of nonsense."""
    cut = encoded("jpeg")
    (tmp_path / "a.jpg").write_bytes(cut[: len(cut) * 3 // 4])
    (tmp_path / "b.jpg").write_bytes(
        encoded("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 40)
    )
    png = bytearray(encoded("png"))
    png[-20] ^= 255
    (tmp_path / "c.png").write_bytes(png)
    tiff = encoded("lzw")
    (tmp_path / "d.tif").write_bytes(tiff[:4] + struct.pack("<I", len(tiff) - 4) + tiff[8:])
    code = (
        "import sys, pathlib\nfrom alignps_jax.media.photos import read_photo\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: print(read_photo(path, 10**6).shape[0])\n    except Exception: print(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["0", "64", "64", "0"], "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real photos are here")
def test_real_photos():
    paths = [path for path in SHARED.rglob("*") if path.suffix in photos.PHOTO_SUFFIXES]
    assert {".jpg", ".jfif", ".avif"} <= {path.suffix for path in paths}
    for path in paths:
        shown = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB")
        np.testing.assert_array_equal(read_photo(path, 10**8), np.asarray(shown))
