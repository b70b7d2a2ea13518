"""The readers that are fuzzed. One more is one more entry of `READERS`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from alignps_jax.files import read_image
from alignps_jax.gallery.sources import origin
from alignps_jax.image_files import read_photo
from alignps_jax.types import Annotations
from data_pipeline import datasets
from data_pipeline.datasets import PreparedSplit
from data_pipeline.pipeline import photo_of
from data_pipeline.sources.source import LARGEST_COORDINATE
from data_pipeline.transforms import decode_jpeg
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.fuzz.gallery_readers import GALLERY_READERS
from tests.fuzz.mutations import damage, damage_image
from tests.fuzz.page_readers import PAGE_READERS
from tests.fuzz.result_readers import RESULT_READERS
from tests.fuzz.run_readers import RUN_READERS
from tests.fuzz.runner import Reader
from tests.fuzz.tensor_readers import TENSOR_READERS

# So that a photo takes at most a third of the memory that a reader may take.
_MAX_PIXELS = 10_000_000


def _prw(folder: Path) -> Sequence[Path]:
    people = [(41, 10, 20, 30, 40), (6, 50.5, 60, 70, 80), (-2, 1, 2, 3, 4)]
    train = {"c2s1_000010": people, "c1s1_000020": people[1:], "c6s3_000030": []}
    test = {"c1s1_000040": people, "c3s1_000050": people[:2], "c1s1_000060": people[1:]}
    queries = [(41, 10, 20, 30, 40, "c1s1_000040"), (6, 50.5, 60, 70, 80, "c3s1_000050")]
    fixtures.write_prw(folder, train, test, queries, ("box_new", "anno_file", "anno_previous"))
    return sorted(folder.rglob("*.mat"))


def _images(folder: Path) -> Sequence[Path]:
    picture = cv2.resize(np.arange(27, dtype=np.uint8).reshape(3, 3, 3) * 9, (40, 30))
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    for number, suffix in enumerate((".jpg", ".png", ".bmp", ".webp", ".tif")):
        cv2.imwrite(str(folder / f"color{number}{suffix}"), picture)
        cv2.imwrite(str(folder / f"grey{number}{suffix}"), gray)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    one = PIL.Image.fromarray(picture)
    one.save(folder / "progressive.jpg", progressive=True, exif=exif)
    one.convert("CMYK").save(folder / "cmyk.jpg")
    one.convert("P").save(folder / "palette.png", exif=exif)
    one.convert("RGBA").save(folder / "opacity.png")
    one.save(folder / "lossy.webp", quality=50)
    one.convert("RGBA").save(folder / "opacity.webp", exif=exif)
    one.convert("1").save(folder / "bits.tif", compression="group4")
    one.save(folder / "deflate.tif", compression="tiff_deflate")
    cv2.imwrite(str(folder / "deep.png"), picture.astype(np.uint16) * 99)
    cv2.imwrite(str(folder / "deep.tif"), picture.astype(np.uint16) * 99)
    return sorted(folder.iterdir())


def _prepared(folder: Path) -> Sequence[Path]:
    _prw(folder)
    for path in (folder / "annotations").glob("*.mat"):
        fixtures.write_photo(folder / "frames" / path.name.removesuffix(".mat"), 60, 80)
    datasets.prepare(fixtures.data_config("prw", folder))
    return sorted(path for path in (folder / "prepared").rglob("*") if path.is_file())


def _read_prepared(folder: Path) -> list[PreparedSplit]:
    prepared = datasets.prepare(fixtures.data_config("prw", folder))
    return [prepared.train, prepared.test]


def _check_prepared(splits: list[PreparedSplit]) -> None:
    for split in splits:
        _check_annotations(split.annotations)
        _check_images([photo_of(split, index) for index in range(len(split.sizes))])
        for boxes, (height, width) in zip(split.annotations.boxes, split.sizes, strict=True):
            assert (boxes >= 0).all(), "a box beyond its photo"
            assert (boxes <= [width, height, width, height]).all(), "a box beyond its photo"


def _read_image(path: Path) -> list[np.ndarray]:
    """As a user's photo, and as one of a data set."""
    shown = read_image(path, _MAX_PIXELS)
    data, header = read_photo(path, _MAX_PIXELS)
    taken = origin(str(path), data)
    assert taken.camera.isprintable(), "a camera's name"
    stored = decode_jpeg(data, "photo", (header.height, header.width))
    assert stored.shape[:2] == (header.height, header.width), "the size of the photo"
    assert shown.shape[:2] in (stored.shape[:2], stored.shape[1::-1]), "the size of the photo"
    return [shown, stored]


def _check_images(images: list[np.ndarray]) -> None:
    for image in images:
        assert image.dtype == np.uint8, "the type of the pixels"
        assert image.ndim == 3, "the shape of a photo"
        assert image.shape[2] == 3, "the colors of a photo"
        assert 0 < image.shape[0] * image.shape[1] <= _MAX_PIXELS, "the size of a photo"


def _check_annotations(split: Annotations) -> None:
    count = len(split.names)
    assert len(set(split.names)) == count, "two images of a name"
    assert split.camera.shape == (count,), "cameras of some images"
    columns = (split.boxes, split.identity, split.labeled)
    assert all(len(column) == count for column in columns), "people of some images"
    for boxes, identity, labeled in zip(*columns, strict=True):
        _check_boxes(boxes)
        assert (boxes[:, 2:] > boxes[:, :2]).all(), "a box without extent"
        assert identity.shape == labeled.shape == (len(boxes),), "identities of some boxes"
        assert identity.dtype == np.int32, "the type of the identities"
        assert (identity[labeled] >= 0).all(), "a labeled person without identity"


def _check_boxes(boxes: np.ndarray) -> None:
    assert boxes.dtype == np.float32, "the type of the boxes"
    assert boxes.ndim == 2, "the shape of the boxes"
    assert boxes.shape[1] == 4, "the shape of the boxes"
    assert (np.abs(boxes) <= 2 * LARGEST_COORDINATE).all(), "a coordinate that is none"


READERS: dict[str, Reader] = {
    "images": Reader(
        build=_images,
        read=lambda _, path: _read_image(path),
        check=_check_images,
        damage=damage_image,
    ),
    # The threads that read records take room, but no memory.
    "prepared": Reader(
        build=_prepared,
        read=lambda folder, _: _read_prepared(folder),
        check=_check_prepared,
        damage=damage,
        memory=8 << 30,
    ),
}
READERS |= TENSOR_READERS | RUN_READERS | RESULT_READERS | GALLERY_READERS | PAGE_READERS
