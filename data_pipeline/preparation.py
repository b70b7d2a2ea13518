"""The shared TFDS builder: writes the photos and annotations of a `Source` as a prepared data set.

Records keep the original bytes of the photos. A photo that cannot be used is black in them, so that
no other photo, and no number in a search protocol, changes its place.
"""

import contextlib
import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from alignps_jax.image_files import decode_photo, lacks_end, read_photo
from alignps_jax.log import progress
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import (
    About,
    Photos,
    Prepared,
    clip_to_photos,
    features,
    listed,
    save_arrays,
    write_about,
)
from data_pipeline.sources.source import Source, stand_in

# Photos per file; so many encoded photos are held in memory while preparing.
_SHARD = 256
_THREADS = 8
_Examples = Iterator[tuple[int, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class _Photo:
    """A photo of (height, width) in a file of so many bytes; a `problem` makes it unusable."""

    size: tuple[int, int]
    bytes: int = -1
    digest: str = ""
    lacks_end: bool = False
    problem: str = ""


class PersonSearch(  # type: ignore[call-arg]  # TFDS hides it from type checkers
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """The photos of a `Source` with their people, in the splits `train` and `test`, in its order.

    A shard-based builder, because it streams: TFDS's generator-based ones hold a split that is not
    to be shuffled in memory. It keeps what it `found` of each photo, in order.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self, folder: str, source: Source, people: dict[str, Annotations], data: ConfigDict
    ):
        """Writes below `folder`; reads photos as `data`, `config.data`, says."""
        self._source, self._people, self._data = source, people, data
        self.found: dict[str, list[_Photo]] = {split: [] for split in people}
        self._bar = progress(desc="preparing", total=sum(len(x.names) for x in people.values()))
        super().__init__(data_dir=folder, file_format="array_record")

    def write(self) -> Path:
        """`download_and_prepare` without TFDS's messages; returns the folder of the files."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), self._bar:
                self.download_and_prepare()
        except RuntimeError as error:  # of the C++ that writes records
            raise OSError(" ".join(str(error).split())) from error
        return Path(self.data_path)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features())

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], _Examples]]]:
        del dl_manager
        shards: dict[str, list[Callable[[], _Examples]]] = {}
        for split, people in self._people.items():
            images = range(len(people.names))
            parts = [images[first : first + _SHARD] for first in images[::_SHARD]]
            shards[split] = [partial(self._examples, split, part) for part in parts]
        return shards

    def _examples(self, split: str, images: range) -> _Examples:
        people = self._people[split]
        read = partial(_read_photo, self._source, people, self._data)
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            for index, (image, photo) in zip(images, pool.map(read, images), strict=True):
                boxes, keep = clip_to_photos(people.boxes[index], np.array([photo.size]))
                self.found[split].append(photo)
                self._bar.update()
                example = {
                    "image": image,
                    "name": people.names[index],
                    "height": photo.size[0],
                    "width": photo.size[1],
                    "boxes": boxes[keep],
                    "identity": people.identity[index][keep],
                    "labeled": people.labeled[index][keep],
                    "camera": int(people.camera[index]),
                }
                yield index, example


def write_prepared(
    source: Source, target: Path, data: ConfigDict, digest: str, stamp: str
) -> Prepared:
    """Writes the set of a source in `target`, complete or not at all, and prints what was found.

    A set that is there is replaced; `digest` and `stamp` are those of `About`.

    Raises:
      UserError: annotations are not in the expected form; or photos are missing, unless
        `data.skip_damaged`.
      OSError: there is no space, for example.
    """
    people = {"train": source.train}
    notes = {"train": list(source.notes)}
    people["test"] = source.test
    if empty := [split for split, annotated in people.items() if not annotated.names]:
        raise UserError(f"{source.root}: found no {empty[0]} images in the annotations")
    protocols = list(_protocols(source))
    notes["test"] = source.notes[len(notes["train"]) :]
    if not data.skip_damaged:
        _check_photos(source, people)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f"{target.name}.partial-"
    ) as temporary:
        builder = PersonSearch(temporary, source, people, data)
        folder = builder.write()
        damaged = {}
        for split, annotated in people.items():
            photos = builder.found[split]
            pairs = zip(annotated.names, photos, strict=True)
            damaged[split] = {name: photo.problem for name, photo in pairs if photo.problem}
            sizes = np.array([photo.size for photo in photos], np.int32)
            file_bytes = np.array([photo.bytes for photo in photos])
            save_arrays(folder, split, Photos(**vars(annotated), sizes=sizes, bytes=file_bytes))
        for protocol in protocols:
            save_arrays(folder, protocol.name, protocol)
        names = [protocol.name for protocol in protocols]
        defaults = list(source.default_protocols)
        about = About(digest, stamp, data.orientation, names, defaults, notes, damaged)
        write_about(folder, about)
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        folder.rename(target)
    main = next(protocol for protocol in protocols if protocol.name == defaults[0])
    for line in (*_counts(source, main), *_oddities(*builder.found.values())):
        print(f"  {line}", flush=True)
    return Prepared(target, about)


def _protocols(source: Source) -> Iterator[SearchProtocol]:
    """All protocols; one that is not reported by default may be unreadable, which is noted."""
    for name in source.protocols:
        try:
            yield source.protocol(name)
        except UserError as error:
            if name in source.default_protocols:
                raise
            source.notes.append(f"{error}; there is no protocol {name}")


def _check_photos(source: Source, people: dict[str, Annotations]) -> None:
    """Looks for all photos before the first is read."""
    paths = [source.image_path(name) for split in people.values() for name in split.names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{source.root}: {len(missing):,} of {len(paths):,} photos are missing "
            f"(--config.data.skip_damaged=True goes on without them):{listed(missing)}"
        )


def _read_photo(
    source: Source, people: Annotations, data: ConfigDict, index: int
) -> tuple[bytes, _Photo]:
    """A photo of the annotated size, or a black one."""
    path = source.image_path(people.names[index])
    annotated = source.photo_size(people.names[index])
    upright = data.orientation == "upright"
    try:
        encoded, header = read_photo(path, data.max_pixels)
        height, width, _ = decode_photo(encoded, header, str(path), upright=upright).shape
        if annotated not in (None, (height, width)):
            other = "stored" if upright else "upright"
            turned = f" (EXIF turns it: data.orientation={other}?)" * (annotated == (width, height))
            expected = "x".join(map(str, annotated))
            raise UserError(
                f"has {height}x{width} pixels (height x width), annotated are {expected}{turned}"
            )
    except UserError as error:
        problem = (path.is_file() and stand_in(path)) or str(error).removeprefix(f"{path}: ")
        size = annotated or (32, 32)
        black = cv2.imencode(".png", np.zeros((*size, 3), np.uint8))[1].tobytes()
        return black, _Photo(size, problem=problem)
    digest = hashlib.blake2b(encoded, digest_size=16).hexdigest()
    unended = header.format == "JPEG" and lacks_end(encoded)
    return encoded, _Photo((height, width), len(encoded), digest, unended)


def _counts(source: Source, protocol: SearchProtocol) -> Iterator[str]:
    """What was found, beside what is published."""
    train, queries = source.train, f"queries ({protocol.name})"
    shown = np.unique(np.concatenate(train.identity)[np.concatenate(train.labeled)])
    names = "training images", "training identities", "test images", queries
    found = len(train.names), len(shown), len(source.test.names), len(protocol.query_image)
    for count, name, known in zip(found, names, source.published or found, strict=True):
        yield f"{count:>8,} {name}" + f" (published: {known:,})" * (known != count)


def _oddities(train: list[_Photo], test: list[_Photo]) -> Iterator[str]:
    unended = sum(photo.lacks_end for photo in (*train, *test))
    if unended:
        yield f"{unended:,} JPEG files lack their end marker, but no pixel"
    known = {photo.digest for photo in train} - {""}
    copies = sum(photo.digest in known for photo in test)
    if copies:
        yield f"{copies:,} test photos are training photos"
