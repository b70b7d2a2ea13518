"""Photos of all formats as a viewer shows them, limits that hold before decoding, and damage."""

import io
import struct

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from alignps_jax.errors import UserError
from alignps_jax.media import decode_photo, exif_of, read_photo

MOST = 10**6
KINDS = """
    JPEG:RGB JPEG:L JPEG:CMYK MPO:RGB:many PNG:RGB PNG:P GIF:RGB:many BMP:RGB PNG:1 WEBP:RGB:many
    WEBP:RGB TIFF:RGB TIFF:RGB:lzw TIFF:RGB:big HEIF:RGB AVIF:RGB
"""
OPTIONS = {
    "many": {"save_all": True, "append_images": [PIL.Image.new("RGB", (96, 64))]},
    "lzw": {"compression": "tiff_lzw"},
    "big": {"big_tiff": True},
}


def picture():
    colors = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    return colors.repeat(16, axis=0).repeat(16, axis=1)


def encoded(kind, pixels=None, mode="RGB", **options):
    data = io.BytesIO()
    image = PIL.Image.fromarray(picture() if pixels is None else pixels)
    options |= {"quality": 95} if kind != "TIFF" else {}
    (image.convert(mode) if mode else image).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("kind", KINDS.split())
def test_formats(kind):
    file_format, mode, *more = kind.split(":")
    data = encoded(file_format, mode=mode, **OPTIONS[more[0]] if more else {})
    found = decode_photo(data, 96 * 64)
    expected = np.asarray(PIL.Image.fromarray(picture()).convert(mode).convert("RGB"), int)
    assert (found.dtype, found.flags.writeable) == (np.uint8, True)
    assert np.abs(found - expected).mean() < (20 if mode == "P" or file_format == "GIF" else 5)
    small = decode_photo(data, 96 * 64, side=24)
    assert (small.shape == (32, 48, 3)) == (file_format in ("JPEG", "MPO"))
    large = cv2.resize(small, (96, 64), interpolation=cv2.INTER_NEAREST).astype(int)
    assert np.abs(large - found).mean() < 5
    with pytest.raises(ValueError, match="found 96x64 pixels"):
        decode_photo(data, 96 * 64 - 1)
    for share in (0.0, 0.1, 0.2) if "many" in more else (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"truncated|cannot be decoded|Unexpected end"):
            decode_photo(data[: int(share * len(data))], MOST)


@pytest.mark.parametrize("kind", ["RGB", "L", "RGB:progressive", "RGB:fine", "RGB:nested"])
def test_jpeg_files_as_data_sets_have_them(kind):
    """Bit by bit as OpenCV decodes them, and complete if they lack no more than the end marker.

    In place of EXIF data, the last one has a photo within, whose end is not that of the file.
    """
    mode, *more = kind.split(":")
    nested = {"exif": b"Exif\0\0" + encoded("JPEG")}
    options = {"progressive": {"progressive": True}, "fine": {"subsampling": 0}, "nested": nested}
    noise = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    data = encoded("JPEG", noise, mode, **options[more[0]] if more else {})
    opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    for whole in (data, data[:-1], data[:-2], data + b"\xff\xd8 notes \xff"):
        np.testing.assert_array_equal(decode_photo(whole, MOST), opencv)
    for missing in (4, 9, len(data) // 8):
        for rest in (b"", bytes(100)):  # downloads fill up with zeros
            with pytest.raises(ValueError, match="truncated JPEG"):
                decode_photo(data[:-missing] + rest, MOST)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_orientation_as_stored_or_upright(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif.tobytes())
    shown = PIL.Image.fromarray(picture())
    shown.getexif()[0x0112] = orientation
    shown = np.asarray(PIL.ImageOps.exif_transpose(shown))
    # HEIC has turns of its own: what is stored is not for data sets.
    for upright, expected in ((True, shown), (False, shown if kind == "HEIF" else picture())):
        found = decode_photo(data, MOST, upright)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[8::16, 8::16], expected[8::16, 8::16], atol=9)
    assert exif_of(io.BytesIO(data))["Orientation"] == (1 if kind == "HEIF" else orientation)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("TIFF", np.uint16([0, 257, 65535]), [0, 1, 255]),
        ("TIFF", np.int32([0, 100, 2000]), [0, 13, 255]),
        ("TIFF", np.float32([0, 0.5, 1]), [0, 128, 255]),
        ("TIFF", np.float32([-1, np.nan, 50, 100]), [0, 0, 128, 255]),
        ("PNG", np.uint8([[1, 2, 3, 0], [50, 100, 0, 51], [9, 8, 7, 255]]), [255, 214, 9]),
    ],
)
def test_more_than_8_bits_and_transparency(kind, values, expected):
    found = decode_photo(encoded(kind, values[None], None), MOST)
    np.testing.assert_array_equal(found[0, :, 0], expected)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "JPEG2000", "ICO", "PDF", "bomb"])
def test_other_formats_and_bombs_are_refused(kind, tmp_path):
    data = encoded("BMP" if kind == "bomb" else kind)
    if kind == "bomb":  # which would take gigabytes
        data = data[:18] + struct.pack("<ii", 50_000, 50_000) + data[26:]
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jpg: (cannot be decoded|found 50000x50000 pixels)"):
        read_photo(tmp_path / "a.jpg", MOST)
