"""The shared TFDS builder: a data set's photos and people as ArrayRecord files.

Records keep the original bytes of the photos. No TensorFlow is involved: the files are written as
`array_record` and read through `as_data_source`. Beside them lies one file with the photos' sizes,
so that opening a prepared data set does not read the photos; its people are those of the source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Bool, Float, Int

from alignps_jax.image_files import decode_photo, read_photo
from alignps_jax.log import progress
from alignps_jax.types import Annotations, UserError
from data_pipeline.leftovers import sign
from data_pipeline.records import (
    SIZES_FILE,
    PreparedSplit,
    StoredImages,
    clip_to_photo,
    clipped,
    features,
    intact,
    read_sizes,
)
from data_pipeline.sources.source import Source, stand_in

SPLITS = ("train", "test")
# Images per file; so many encoded photos are held in memory while preparing.
SHARD_IMAGES = 256
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class _Photo:
    """A photo that was read and found complete, with its people clipped to it."""

    name: str
    image: bytes
    height: int
    width: int
    boxes: Float[np.ndarray, "G 4"]
    identity: Int[np.ndarray, "G"]
    labeled: Bool[np.ndarray, "G"]
    camera: int
    clipped: int
    dropped: int


class PersonSearchBuilder(  # type: ignore[call-arg]  # TFDS hides it from type checkers
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """Writes the splits `train` and `test` of a `Source`, in the order of its annotations.

    The fingerprint of annotations and photos is the TFDS config: files made from others lie in a
    folder of their own, and are never taken for these. TFDS writes to a folder with another name
    and renames it at the end, so an interrupted preparation is never taken for a complete one.
    (A shard-based builder, because it streams: TFDS's generator-based ones hold a split that is
    not to be shuffled in memory.)

    Attributes:
      clipped: boxes that `download_and_prepare` clipped to their photo.
      dropped: boxes that it left out because nothing of them lies on the photo.
    """

    VERSION = tfds.core.Version("1.1.0")
    source_class: ClassVar[type[Source]]

    def __init__(
        self,
        *,
        root: str | Path,
        data_dir: str | Path,
        max_pixels: int,
        shard_images: int = SHARD_IMAGES,
    ):
        """Reads the annotations below `root`; the files go below `data_dir`.

        A photo of more than `max_pixels` pixels (`data.max_pixels`) is an error. A file gets at
        most `shard_images` photos.
        """
        self._max_pixels, self._shard_images = max_pixels, shard_images
        self.source = self.source_class(root)
        self.annotations = {"train": self.source.train, "test": self.source.test}
        self.clipped = self.dropped = 0
        self._photos: dict[str, list[_Photo]] = {}
        self._bar = progress(desc="", unit="image", disable=True)
        config = tfds.core.BuilderConfig(name=self._fingerprint())
        with _quiet_tfds(), intact(Path(data_dir) / self.name / config.name / str(self.VERSION)):
            super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    @property
    def is_prepared(self) -> bool:
        """Whether the files are there, complete, and made from these annotations and photos."""
        return self.data_path.exists()

    @property
    def folder(self) -> Path:
        """Where this data set's prepared files lie, whatever they were made from."""
        return Path(self.data_path).parents[1]

    @property
    def outdated(self) -> list[Path]:
        """Complete prepared files that were made from other annotations or photos."""
        return sorted(
            path
            for path in self.folder.glob(f"*/{self.VERSION}")
            if path.is_dir() and path != Path(self.data_path)
        )

    def prepare(self) -> bool:
        """`download_and_prepare` without TFDS's own messages.

        Returns:
          False if another process prepared the same meanwhile; a new builder opens that.

        Raises:
          UserError: a photo is missing, damaged or not as annotated, or the folder cannot be
            written.
        """
        folder = Path(self.data_path).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error
        self._check_photos_exist()
        try:
            # TFDS wants a folder for downloads, of which there are none.
            with (
                tempfile.TemporaryDirectory() as downloads,
                _quiet_tfds(),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                self.download_and_prepare(download_dir=downloads)
        except OSError as error:
            if self.is_prepared:
                return False
            raise _not_writable(folder, error) from error
        except RuntimeError as error:  # of the C++ that writes records
            found = re.search(r"write\(\) failed: ([^;]+); writing", str(error))
            if found is None:
                raise
            raise _not_writable(folder, OSError(0, found[1])) from error
        finally:
            self._bar.close()
        return True

    def open(self, split: str) -> PreparedSplit:
        """A prepared split.

        Raises:
          UserError: a file of it is gone or damaged, or a photo has more pixels than allowed.
        """
        folder = Path(self.data_path)
        with intact(folder):
            files = [Path(path) for path in self.info.splits[split].filepaths]
            for path in (*files, folder / SIZES_FILE):
                if not path.is_file():
                    raise UserError(
                        f"{path}: no such file, but part of a prepared data set; delete "
                        f"{folder} to prepare it again"
                    )
            people = self.annotations[split]
            sizes = read_sizes(folder / SIZES_FILE, split, people.names, self._max_pixels)
            records = self.as_data_source(split=split).data_source
            if len(records) != len(people.names):
                raise ValueError(f"{len(records)} {split} records of {len(people.names)} photos")
        return PreparedSplit(clipped(people, sizes), sizes, StoredImages(records, folder))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=features()
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        del dl_manager
        self.clipped = self.dropped = 0
        self._photos = {split: [] for split in SPLITS}
        shards: dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]] = {}
        for split in SPLITS:
            count = len(self.annotations[split].names)
            size = self._shard_images
            parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
            shards[split] = [functools.partial(self._generate_examples, split, p) for p in parts]
        return shards

    def _generate_examples(
        self, split: str, indices: range
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if indices.start == 0:
            count = len(self.annotations[split].names)
            self._bar.close()
            self._bar = progress(desc=f"preparing {split}", unit="image", total=count)
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            read = functools.partial(
                _read_photo, self.source, self.annotations[split], self._max_pixels
            )
            for index, photo in zip(indices, pool.map(read, indices), strict=True):
                self.clipped += photo.clipped
                self.dropped += photo.dropped
                self._photos[split].append(dataclasses.replace(photo, image=b""))
                yield index, {name: getattr(photo, name) for name in features()}
                self._bar.update()

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        # TFDS calls this with `data_path` set to the folder that it renames when all is done.
        sign(Path(self.data_path))
        super()._download_and_prepare(*args, **kwargs)
        sizes = {
            split: [(photo.height, photo.width) for photo in photos]
            for split, photos in self._photos.items()
        }
        (Path(self.data_path) / SIZES_FILE).write_text(json.dumps(sizes))
        if self._fingerprint() != self.builder_config.name:
            raise UserError(
                f"{self.source.root}: found photos that changed while they were prepared; start "
                "again once they stay as they are"
            )

    def _fingerprint(self) -> str:
        photos = {
            split: photo_files(self.source, people.names)
            for split, people in self.annotations.items()
        }
        return fingerprint(self.annotations, photos)

    def _check_photos_exist(self) -> None:
        for split in SPLITS:
            names = self.annotations[split].names
            if not names:
                raise UserError(
                    f"{self.source.root}: found no {split} images in the annotations, expected some"
                )
            paths = [self.source.image_path(name) for name in names]
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise UserError(
                    f"{missing[0]}: no such image; missing: {len(missing)} of the {len(names)} "
                    f"{split} images"
                )


# (Size in bytes, time of the last change in nanoseconds) of a photo; None: there is none.
PhotoFile = tuple[int, int] | None


def photo_files(source: Source, names: Sequence[str]) -> list[PhotoFile]:
    """What the file system says of each photo, which is where `Source.image_path` finds it."""
    return [_photo_file(source.image_path(name)) for name in names]


def _photo_file(path: Path) -> PhotoFile:
    try:
        about = path.stat()
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None


def fingerprint(
    annotations: Mapping[str, Annotations], photos: Mapping[str, Sequence[PhotoFile]]
) -> str:
    """Twelve hexadecimal digits that stand for the annotations and photos of all splits."""
    digest = hashlib.sha256()
    for split, people in annotations.items():
        digest.update(repr((split, people.names, photos[split])).encode())
        counts = np.array([len(boxes) for boxes in people.boxes], np.int64)
        for rows in ([counts, people.camera], people.boxes, people.identity, people.labeled):
            for array in rows:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def _read_photo(source: Source, annotations: Annotations, max_pixels: int, index: int) -> _Photo:
    name = annotations.names[index]
    path = source.image_path(name)
    try:
        image, header = read_photo(path, max_pixels)
    except UserError as error:
        found = stand_in(path) if path.is_file() else None
        raise UserError(f"{path}: {found}") if found else error from error
    decode_photo(image, header, str(path), upright=False)
    height, width = header.height, header.width
    annotated = source.photo_size(name)
    if annotated not in (None, (height, width)):
        turned = "; an EXIF orientation turns it when shown" * (annotated == (width, height))
        raise UserError(
            f"{path}: is {height}x{width} pixels (height x width, as stored{turned}); expected "
            f"{annotated[0]}x{annotated[1]} as annotated"
        )
    boxes, keep = clip_to_photo(annotations.boxes[index], height, width)
    return _Photo(
        name=name,
        image=image,
        height=height,
        width=width,
        boxes=boxes[keep],
        identity=annotations.identity[index][keep],
        labeled=annotations.labeled[index][keep],
        camera=int(annotations.camera[index]),
        clipped=int((boxes != annotations.boxes[index]).any(axis=1)[keep].sum()),
        dropped=int((~keep).sum()),
    )


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot be written ({error.strerror or error}); set "
        "--config.data.prepared_dir to a folder that can"
    )


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Without TFDS's log lines below an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
