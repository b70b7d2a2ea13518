"""Sizes of photos against Pillow's, limits that hold before anything is decoded, and damage."""

import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageOps

from alignps_jax.image_files import decode_photo, read_header, read_photo
from alignps_jax.types import UserError
from tests.places import SHARED

VARIANTS = {
    "jpeg": ("jpeg", "RGB", {}),
    "progressive": ("jpeg", "RGB", {"progressive": True}),
    "gray jpeg": ("jpeg", "L", {}),
    "cmyk": ("jpeg", "CMYK", {}),
    "jpeg with exif": ("jpeg", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
    "png": ("png", "RGB", {}),
    "palette": ("png", "P", {}),
    "transparent": ("png", "RGBA", {}),
    "bmp": ("bmp", "RGB", {}),
    "gray bmp": ("bmp", "L", {}),
    "webp": ("webp", "RGB", {}),
    "lossless": ("webp", "RGB", {"lossless": True}),
    "transparent webp": ("webp", "RGBA", {}),
    "tiff": ("tiff", "RGB", {}),
    "lzw": ("tiff", "RGB", {"compression": "tiff_lzw"}),
    "gray tiff": ("tiff", "L", {}),
}
SIZES = ((1, 1), (40, 60), (61, 33), (300, 257))


def encoded(variant, height, width):
    file_format, mode, options = VARIANTS[variant]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    PILImage.fromarray(noise).convert(mode).save(data, file_format, **options)
    return data.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_pillows_and_the_decoders_and_limited(tmp_path, variant, size):
    path, pixels = tmp_path / "a", size[0] * size[1]
    path.write_bytes(encoded(variant, *size))
    with pytest.raises(UserError, match=rf"a: has {size[1]}x{size[0]} pixels; expected at most"):
        read_photo(path, pixels - 1)
    data, header = read_photo(path, pixels)
    with PILImage.open(path) as image:
        assert (header.width, header.height) == image.size
        assert header.format.lower() == image.format.lower()
    assert data == path.read_bytes()
    for upright in (False, True):
        assert decode_photo(data, header, "a", upright=upright).shape == (*size, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("side", ["H", "I"])
def test_tiff_of_either_byte_order(order, side):
    kind = 3 if side == "H" else 4
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entries = [
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(order + side, value).ljust(4, b"\0")
        for tag, value in ((256, 70), (257, 50))
    ]
    head = magic + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", 2)
    header = read_header(head + b"".join(entries))
    assert (header.height, header.width) == (50, 70)
    assert read_header(head + entries[0]) is None
    assert read_header(head + entries[0] * 2) is None


@pytest.mark.parametrize(
    "about", [struct.pack("<Iii", 40, 30, -20), struct.pack("<IHH", 12, 30, 20)]
)
def test_a_windows_bitmap_from_above_and_an_old_one(about):
    header = read_header(b"BM" + bytes(12) + about)
    assert (header.height, header.width) == (20, 30)


def test_a_thumbnail_does_not_count():
    thumbnail, photo = encoded("jpeg", 8, 9), encoded("jpeg", 40, 60)
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    header = read_header(photo[:2] + segment + photo[2:])
    assert (header.height, header.width) == (40, 60)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    PILImage.new("1", (6000, 5000)).save(path)
    assert path.stat().st_size < 60_000
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb.png: has 6000x5000 pixels; expected at most 20,"):
        read_photo(path, 20_000_000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_files_that_end_early(tmp_path, variant, share):
    path = tmp_path / "a"
    data = encoded(variant, 300, 257)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"a: .*expected a complete") as error:
        decode_photo(*read_photo(path, 10**6), str(path), upright=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp", "tiff"])
def test_orientation_as_stored_or_upright(file_format, orientation):
    colors = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    photo = PILImage.fromarray(colors.repeat(16, axis=0).repeat(16, axis=1))
    photo.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(photo), int)
    target = io.BytesIO()
    photo.save(target, file_format, exif=photo.getexif())
    header = read_header(target.getvalue())
    for upright, expected in ((False, np.asarray(photo, int)), (True, shown)):
        found = decode_photo(target.getvalue(), header, "a", upright=upright)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 12


def test_a_jpeg_without_end_marker_is_complete_if_all_pixels_are_there(tmp_path):
    data = encoded("jpeg", 60, 90)
    assert data.endswith(b"\xff\xd9")
    path = tmp_path / "a.jpg"
    expected = decode_photo(data, read_header(data), "a", upright=False)
    for missing in (1, 2):
        path.write_bytes(data[:-missing])
        found = decode_photo(*read_photo(path, 10**6), "a", upright=False)
        np.testing.assert_array_equal(found, expected)
    for missing in (4, 5, 9, 60, len(data) // 2):
        for rest in (b"", bytes(100)):  # downloads fill up with zeros
            path.write_bytes(data[:-missing] + rest)
            with pytest.raises(UserError, match="truncated JPEG"):
                read_photo(path, 10**6)


@pytest.mark.parametrize("file_format", ["gif", "ppm", "tga", "jpeg2000", "ico"])
def test_other_formats_are_refused(tmp_path, file_format):
    path = tmp_path / "a"
    PILImage.new("RGB", (32, 32)).save(path, file_format)
    with pytest.raises(UserError, match=r"expected a complete JPEG, PNG, BMP, WebP or TIFF image"):
        read_photo(path, 10**6)


@pytest.mark.parametrize("promised", [(40, 61), (60, 40)])
def test_a_header_that_the_decoder_does_not_see(promised):
    """What is decoded has the size that was checked, or is refused."""
    header = read_header(encoded("png", *promised))
    with pytest.raises(UserError, match="a: cannot be decoded"):
        decode_photo(encoded("png", 40, 60), header, "a", upright=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pipe.jpg", "is no file; expected"), ("missing.jpg", "No such file"), (".", "directory")],
)
def test_pipes_folders_and_missing_files(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=message):
        read_photo(tmp_path / name, 100)


def test_a_file_larger_than_its_pixels_is_not_read_in_full(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("jpeg", 40, 60))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    data, header = read_photo(path, 2400)
    assert (header.height, header.width) == (40, 60)
    assert len(data) < 1 << 27


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real photos are here")
def test_real_photos():
    paths = sorted(SHARED.rglob("*.jpg"))
    assert paths
    for path in paths:
        _, header = read_photo(path, 10**8)
        with PILImage.open(path) as image:
            assert (header.width, header.height) == image.size
