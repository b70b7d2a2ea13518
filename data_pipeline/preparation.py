"""The shared TFDS builder: writes the photos and annotations of a `Source` as a prepared data set.

Records keep the original bytes of the photos. No TensorFlow is involved: TFDS writes `array_record`
files. A photo that cannot be used is black in the records, so that no other photo, and no number
in a search protocol, changes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int
from ml_collections import ConfigDict

from alignps_jax.image_files import decode_photo, lacks_end, read_photo
from alignps_jax.log import progress
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import About, Prepared, clip_to_photos, listed, write_about, write_index
from data_pipeline.sources.source import Counts, Source, stand_in

# Photos per file; so many encoded photos are held in memory while preparing.
_SHARD = 256
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class _Photo:
    """A photo of (height, width); a black one in place of one that a `problem` makes unusable."""

    image: bytes
    size: tuple[int, int]
    file_bytes: int = -1
    content: bytes = b""  # stands for that of the file
    unended: bool = False
    problem: str = ""


class PersonSearch(  # type: ignore[call-arg]  # TFDS hides it from type checkers
    tfds.core.ShardBasedBuilder, skip_registration=True
):
    """Photos with their people: the splits `train` and `test`, in the order of the annotations.

    A shard-based builder, because it streams: TFDS's generator-based ones hold a split that is not
    to be shuffled in memory.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        data_dir: str,
        people: dict[str, Annotations],
        read: Callable[[str, range], Iterator[_Photo]],
    ):
        """`read` gives the photos at some positions of a split."""
        self._people, self._read = people, read
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Boxes x1, y1, x2, y2 are clipped to the photo; `identity` is meaningful where `labeled`;
        # `camera` is 0 where the data set has none.
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "name": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "identity": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "labeled": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
            "camera": np.int32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        del dl_manager
        shards: dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]] = {}
        for split, people in self._people.items():
            positions = range(len(people.names))
            parts = [positions[start : start + _SHARD] for start in positions[::_SHARD]]
            shards[split] = [functools.partial(self._examples, split, part) for part in parts]
        return shards

    def _examples(self, split: str, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        people = self._people[split]
        for index, photo in zip(indices, self._read(split, indices), strict=True):
            boxes, keep = clip_to_photos(people.boxes[index], np.array([photo.size]))
            example = {
                "image": photo.image,
                "name": people.names[index],
                "height": photo.size[0],
                "width": photo.size[1],
                "boxes": boxes[keep],
                "identity": people.identity[index][keep],
                "labeled": people.labeled[index][keep],
                "camera": int(people.camera[index]),
            }
            yield index, example


class _Reader:
    """Reads the photos of a source in threads, and keeps what it `found` of each."""

    def __init__(
        self,
        source: Source,
        people: dict[str, Annotations],
        data: ConfigDict,
        done: Callable[[], object],
    ):
        self._done = done
        self._source, self._people, self._max_pixels = source, people, data.max_pixels
        self._upright = data.orientation == "upright"
        self.found: dict[str, list[_Photo]] = {split: [] for split in people}

    def photos(self, split: str, indices: range) -> Iterator[_Photo]:
        """The photos at these positions of a split."""
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            for photo in pool.map(functools.partial(self._photo, self._people[split]), indices):
                self.found[split].append(dataclasses.replace(photo, image=b""))
                yield photo
                self._done()

    def sizes(self) -> dict[str, Int[np.ndarray, "_ 2"]]:
        """(height, width) of each photo, by split."""
        return {x: np.array([p.size for p in found], np.int32) for x, found in self.found.items()}

    def file_bytes(self) -> dict[str, Int[np.ndarray, "_"]]:
        """The size of each file, -1 where it cannot be used."""
        return {x: np.array([p.file_bytes for p in found]) for x, found in self.found.items()}

    def problems(self) -> dict[str, dict[str, str]]:
        """Why photos cannot be used, by split and name."""
        return {
            split: {
                name: photo.problem
                for name, photo in zip(self._people[split].names, found, strict=True)
                if photo.problem
            }
            for split, found in self.found.items()
        }

    def _photo(self, people: Annotations, index: int) -> _Photo:
        name = people.names[index]
        path = self._source.image_path(name)
        annotated = self._source.photo_size(name)
        try:
            data, header = read_photo(path, self._max_pixels)
            size = decode_photo(data, header, str(path), upright=self._upright).shape[:2]
            if annotated not in (None, size):
                raise UserError(f"{path}: {_other_size(size, annotated, self._upright)}")
        except UserError as error:
            problem = (path.is_file() and stand_in(path)) or str(error).removeprefix(f"{path}: ")
            corners = people.boxes[index].max(axis=0, initial=1).astype(int).tolist()
            size = annotated or (min(corners[3], 2**12), min(corners[2], 2**12))
            black = cv2.imencode(".png", np.zeros((*size, 3), np.uint8))[1].tobytes()
            return _Photo(black, size, problem=problem)
        content = hashlib.blake2b(data, digest_size=16).digest()
        unended = header.format == "JPEG" and lacks_end(data)
        return _Photo(data, size, path.stat().st_size, content, unended)


def write_prepared(
    source: Source, target: Path, data: ConfigDict, *, digest: str, stamp: str
) -> Prepared:
    """Writes a prepared data set, complete or not at all, and prints what was found.

    Args:
      source: its annotations and photos.
      target: the folder; one that is there is replaced.
      data: `config.data`.
      digest: see `About`.
      stamp: see `About`.

    Raises:
      UserError: annotations are not in the expected form; photos are missing, unless
        `data.skip_damaged`; or none of a split can be used.
      OSError: there is no space, for example.
    """
    people = {"train": source.train}
    notes = {"train": list(source.notes)}
    people["test"] = source.test
    protocols = list(_protocols(source))
    notes["test"] = source.notes[len(notes["train"]) :]
    _check_photos(source, people, data.skip_damaged)
    total = sum(len(annotated.names) for annotated in people.values())
    with (
        tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f"{target.name}.partial-"
        ) as temporary,
        progress(desc="preparing", unit="image", total=total) as bar,
    ):
        reader = _Reader(source, people, data, bar.update)
        builder = PersonSearch(temporary, people, reader.photos)
        _download_and_prepare(builder, Path(temporary) / "downloads")
        folder, damaged = Path(builder.data_path), reader.problems()
        for split, problems in damaged.items():
            if len(problems) == len(people[split].names):
                reasons = listed(f"{name}: {reason}" for name, reason in problems.items())
                raise UserError(f"{source.root}: no {split} photo can be used:{reasons}")
        about = About(
            title=source.title,
            digest=digest,
            stamp=stamp,
            orientation=data.orientation,
            protocols=[protocol.name for protocol in protocols],
            default_protocols=list(source.default_protocols),
            notes=notes,
            damaged=damaged,
        )
        write_index(folder, people, reader.sizes(), reader.file_bytes(), protocols)
        write_about(folder, about)
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        folder.rename(target)
    print(_summary(source, people, protocols, reader), flush=True)
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


def _check_photos(source: Source, people: dict[str, Annotations], skip: bool) -> None:
    """Looks for all photos before the first is read."""
    for split, annotated in people.items():
        names = annotated.names
        if not names:
            raise UserError(
                f"{source.root}: found no {split} images in the annotations, expected some"
            )
        paths = (source.image_path(name) for name in names)
        missing = [str(path) for path in paths if not path.is_file()]
        if missing and not skip:
            raise UserError(
                f"{source.root}: {len(missing):,} of {len(names):,} {split} photos are missing "
                f"(--config.data.skip_damaged=True goes on without them):{listed(missing)}"
            )


def _download_and_prepare(builder: PersonSearch, downloads: Path) -> None:
    """As TFDS does, without its messages and with one bar."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads)
    except RuntimeError as error:  # of the C++ that writes records
        raise OSError(" ".join(str(error).split())) from error
    finally:
        logging.set_verbosity(verbosity)


def _other_size(size: tuple[int, int], annotated: tuple[int, int] | None, upright: bool) -> str:
    assert annotated is not None
    other = "stored" if upright else "upright"
    turned = f" (EXIF turns it: data.orientation={other}?)" * (annotated == size[::-1])
    found, expected = ("x".join(map(str, sides)) for sides in (size, annotated))
    return f"has {found} pixels (height x width), annotated are {expected}{turned}"


def _summary(
    source: Source,
    people: dict[str, Annotations],
    protocols: list[SearchProtocol],
    reader: _Reader,
) -> str:
    """What was found, beside what is published."""
    main = next(one for one in protocols if one.name == source.default_protocols[0])
    train, test = people.values()
    shown = [ids[mask] for ids, mask in zip(train.identity, train.labeled, strict=True)]
    identities = len(np.unique(np.concatenate(shown)))
    found = Counts(len(train.names), identities, len(test.names), len(main.query_image))
    labels = "training images", "training identities", "test images", f"queries ({main.name})"
    known = source.published and dataclasses.astuple(source.published)
    columns = [labels, dataclasses.astuple(found)] + [known] * bool(known)
    lines = [f"  {'':20}{'found':>10}" + f"{'published':>12}" * bool(known)]
    for label, count, *published in zip(*columns, strict=True):
        lines.append(f"  {label:20}{count:>10,}" + "".join(f"{x:>12,}" for x in published))
    different = [label for label, *counts in zip(*columns, strict=True) if len(set(counts)) > 1]
    if different:
        remark = f" ({source.remark})" if source.remark else ""
        lines.append(f"  warning: differs from what is published: {', '.join(different)}{remark}")
    lines += [f"  {line}" for line in _findings(people, reader)]
    return "\n".join(lines)


def _findings(people: dict[str, Annotations], reader: _Reader) -> Iterator[str]:
    boxes = np.concatenate([rows for split in people.values() for rows in split.boxes])
    counts = [len(rows) for split in people.values() for rows in split.boxes]
    sizes = np.concatenate(list(reader.sizes().values()))
    inside, keep = clip_to_photos(boxes, np.repeat(sizes, counts, axis=0))
    clipped = int((inside != boxes).any(axis=1)[keep].sum())
    yield f"clipped {clipped:,} boxes to their photo, dropped {int((~keep).sum()):,} outside"
    unended = sum(photo.unended for photos in reader.found.values() for photo in photos)
    if unended:
        yield f"{unended:,} JPEG files lack their end marker, but no pixel"
    train, test = (
        [(photo.content, name) for name, photo in zip(split.names, reader.found[part], strict=True)]
        for part, split in people.items()
    )
    trained = dict(train)
    copies = sum(bool(content) and trained.get(content, name) != name for content, name in test)
    if copies:
        yield f"{copies:,} test photos are training photos of another name"
