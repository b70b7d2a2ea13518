"""Writes the photos and annotations of a `Source` as a prepared data set, which TFDS reads.

Records keep the original bytes of the photos. A photo that cannot be used is black in them, so that
no other photo, and no number in a search protocol, changes its place.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from alignps_jax.log import progress
from alignps_jax.media import decode_photo
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


@dataclasses.dataclass(frozen=True)
class _Photo:
    """A photo's (height, width) and its file's size in bytes; a `problem` makes it unusable."""

    size: tuple[int, int]
    bytes: int = -1
    digest: str = ""
    problem: str = ""


def write_prepared(
    source: Source, target: Path, data: ConfigDict, digest: str, stamp: str
) -> Prepared:
    """Writes the set of a source in `target`, complete or not at all, and prints what was found.

    A set that is there is replaced; `digest` and `stamp` are those of `About`.

    Raises:
      UserError: annotations are not in the expected form, or photos are missing.
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
        folder = Path(temporary) / target.name
        folder.mkdir()
        found = _write_records(folder, source, people, data)
        damaged = {}
        for split, annotated in people.items():
            photos = found[split]
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
    for line in _summary(source, main, found["train"], found["test"]):
        print(f"  {line}", flush=True)
    return Prepared(target, about)


def _write_records(
    folder: Path, source: Source, people: dict[str, Annotations], data: ConfigDict
) -> dict[str, list[_Photo]]:
    """Writes the photos of all splits with their people; returns what is known of each photo."""
    version = tfds.core.Version("2.0.0")
    identity = tfds.core.DatasetIdentity("person_search", version, str(folder), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features())
    writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
    writer.initialize_splits([*people])
    found: dict[str, list[_Photo]] = {split: [] for split in people}
    try:
        for split, annotated in people.items():
            examples = _examples(source, annotated, data, found[split])
            bar = progress(examples, desc=f"preparing {split}", total=len(annotated.names))
            writer.add_examples({split: bar})
        writer.close_all()
    except RuntimeError as error:  # of the C++ that writes records
        raise OSError(" ".join(str(error).split())) from error
    return found


def _examples(
    source: Source, people: Annotations, data: ConfigDict, found: list[_Photo]
) -> Iterator[dict[str, Any]]:
    """The records of a split; adds what is known of each photo to `found`."""
    images, read = range(len(people.names)), partial(_read_photo, source, people, data)
    with futures.ThreadPoolExecutor(8) as pool:
        for first in images[::_SHARD]:
            part = images[first : first + _SHARD]
            for index, (image, photo) in zip(part, pool.map(read, part), strict=True):
                boxes, keep = clip_to_photos(people.boxes[index], np.array([photo.size]))
                found.append(photo)
                yield {
                    "image": image,
                    "name": people.names[index],
                    "height": photo.size[0],
                    "width": photo.size[1],
                    "boxes": boxes[keep],
                    "identity": people.identity[index][keep],
                    "labeled": people.labeled[index][keep],
                    "camera": int(people.camera[index]),
                }


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
        encoded = path.read_bytes()
        height, width, _ = decode_photo(encoded, data.max_pixels, upright).shape
        if annotated not in (None, (height, width)):
            other = "stored" if upright else "upright"
            turned = f" (EXIF turns it: data.orientation={other}?)" * (annotated == (width, height))
            expected = "x".join(map(str, annotated))
            raise ValueError(
                f"has {height}x{width} pixels (height x width), annotated are {expected}{turned}"
            )
    except (ValueError, OSError) as error:
        problem = (path.is_file() and stand_in(path)) or str(error)
        black = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
        return black, _Photo((32, 32), problem=problem)
    digest = hashlib.blake2b(encoded, digest_size=16).hexdigest()
    return encoded, _Photo((height, width), len(encoded), digest)


def _summary(
    source: Source, protocol: SearchProtocol, train: list[_Photo], test: list[_Photo]
) -> Iterator[str]:
    """What was found, beside what is published, and what is odd about the photos."""
    people, queries = source.train, f"queries ({protocol.name})"
    shown = np.unique(np.concatenate(people.identity)[np.concatenate(people.labeled)])
    names = "training images", "training identities", "test images", queries
    found = len(train), len(shown), len(test), len(protocol.query_image)
    for count, name, known in zip(found, names, source.published or found, strict=True):
        yield f"{count:>8,} {name}" + f" (published: {known:,})" * (known != count)
    digests = {photo.digest for photo in train} - {""}
    if copies := sum(photo.digest in digests for photo in test):
        yield f"{copies:,} test photos are training photos"
