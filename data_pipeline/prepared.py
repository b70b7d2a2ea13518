"""A prepared data set: encoded photos as TFDS records, with all annotations beside them.

Its folder holds the splits `train` and `test` (ArrayRecord files that TFDS reads without
TensorFlow), `index.npz` (people and sizes of all photos, search protocols), `galleries.npy` (the
galleries of all protocols, mapped into memory) and `about.json`. Nothing else is read, so the
folder may be moved, and the original files may be gone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Int, Shaped

from alignps_jax.errors import blame, known_name
from alignps_jax.types import Annotations, SearchProtocol

SPLITS = ("train", "test")
INDEX, GALLERIES, ABOUT = "index.npz", "galleries.npy", "about.json"
_LISTED = 10


class About(msgspec.Struct):
    """Where a prepared set comes from.

    `digest` stands for the content of the annotation files, `stamp` for their sizes and times.
    `damaged` has the reason for each photo that could not be used, by split and name.
    """

    title: str
    digest: str
    stamp: str
    orientation: str
    protocols: list[str]
    default_protocols: list[str]
    notes: dict[str, list[str]]
    damaged: dict[str, dict[str, str]]


class Photos(Sequence[bytes]):
    """The encoded photos of a split by position, each read when it is asked for.

    Readable from several threads at once.
    """

    def __init__(self, read: Callable[[int], bytes], images: Int[np.ndarray, "n"]):
        """Photo `i` is `read(images[i])`."""
        self._read, self._images = read, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        """The bytes of one photo; there are no slices."""
        return self._read(int(self._images[index]))


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """N photos: people clipped to them, sizes (height, width), and the encoded bytes.

    Where `upright`, sizes and people are those of photos turned as their EXIF orientation says.
    """

    annotations: Annotations
    sizes: Int[np.ndarray, "N 2"]
    jpegs: Sequence[bytes]
    upright: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set in a folder; it reads as a `Source` does, and holds the photos, too."""

    folder: Path
    about: About

    @property
    def train(self) -> Annotations:
        """The training images as annotated, people not clipped to the photos."""
        return self._people("train")

    @property
    def test(self) -> Annotations:
        """The test images as the published evaluation takes them."""
        return self._people("test")

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """The protocols to report when nobody asks for others, the main one first."""
        return tuple(self.about.default_protocols)

    def notes(self, split: str) -> list[str]:
        """Lines about the annotations, and about photos that could not be used."""
        count = len(self.about.damaged[split])
        fate = "not trained on" if split == "train" else "black when people are searched"
        line = f"{self.folder}: {count:,} {split} photos cannot be used, they are {fate}"
        return self.about.notes[split] + [line] * bool(count)

    def protocol(self, name: str) -> SearchProtocol:
        """One of the search protocols, over the images of `test`."""
        known_name("config.eval.protocols", name, self.about.protocols)
        part = functools.partial(self._part, name)
        first, counts = int(part("first")), part("counts")
        entries = self._galleries[first : first + counts.sum()]
        targets = part("target_counts")
        return SearchProtocol(
            name=name,
            query_image=part("query_image"),
            query_box=part("query_box"),
            gallery=rows_of(entries, counts),
            target_images=rows_of(part("target_images"), targets),
            target_boxes=rows_of(part("target_boxes"), targets),
        )

    def split(self, name: str) -> PreparedSplit:
        """The photos of a split, with the people in them that can be seen."""
        sizes, counts = self._part(name, "sizes"), self._part(name, "counts")
        photo = np.repeat(np.arange(len(counts)), counts)
        boxes, keep = clip_to_photos(self._part(name, "boxes"), sizes[photo])
        if name == "train":
            keep &= self._part(name, "bytes")[photo] >= 0
        seen = np.bincount(photo[keep], minlength=len(counts))
        people = dataclasses.replace(
            self._people(name),
            boxes=rows_of(boxes[keep], seen),
            identity=rows_of(self._part(name, "identity")[keep], seen),
            labeled=rows_of(self._part(name, "labeled")[keep], seen),
        )
        records = tfds.builder_from_directory(self.folder).as_data_source(
            name, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return PreparedSplit(
            people,
            sizes,
            Photos(lambda index: records[index]["image"], np.arange(len(counts))),
            upright=self.about.orientation == "upright",
        )

    def photo_bytes(self) -> dict[str, int]:
        """The size in bytes of each photo that could be used, by name."""
        names = [name for split in SPLITS for name in self._part(split, "names").tolist()]
        sizes = np.concatenate([self._part(split, "bytes") for split in SPLITS]).tolist()
        return {name: size for name, size in zip(names, sizes, strict=True) if size >= 0}

    def _people(self, split: str) -> Annotations:
        counts = self._part(split, "counts")
        return Annotations(
            names=tuple(self._part(split, "names").tolist()),
            camera=self._part(split, "camera"),
            boxes=rows_of(self._part(split, "boxes"), counts),
            identity=rows_of(self._part(split, "identity"), counts),
            labeled=rows_of(self._part(split, "labeled"), counts),
        )

    def _part(self, part: str, field: str) -> Shaped[np.ndarray, "..."]:
        with blame(self.folder):
            array: np.ndarray = self._index[f"{part}/{field}"]
            return array

    @functools.cached_property
    def _index(self) -> Any:
        return np.load(self.folder / INDEX)

    @functools.cached_property
    def _galleries(self) -> Int[np.ndarray, "E"]:
        with blame(self.folder):
            return np.asarray(np.load(self.folder / GALLERIES, mmap_mode="r"))


def read_about(folder: Path) -> About | None:
    """What a folder says of itself; None if it is no prepared set, or one of another version."""
    try:
        return msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
    except msgspec.DecodeError:
        return None


def write_about(folder: Path, about: About) -> None:
    """Writes it, complete or not at all."""
    temporary = folder / f"{ABOUT}.part"
    temporary.write_bytes(msgspec.json.encode(about))
    temporary.replace(folder / ABOUT)


def write_index(
    folder: Path,
    people: dict[str, Annotations],
    sizes: dict[str, Int[np.ndarray, "_ 2"]],
    file_bytes: dict[str, Int[np.ndarray, "_"]],
    protocols: Iterable[SearchProtocol],
) -> None:
    """Writes what `Prepared` reads beside the records; `file_bytes` is -1 for an unusable photo."""
    index: dict[str, Any] = {}
    for split, annotated in people.items():
        index |= {
            f"{split}/names": np.array(annotated.names, np.str_),
            f"{split}/camera": annotated.camera,
            f"{split}/counts": _counts(annotated.boxes),
            f"{split}/boxes": np.concatenate(annotated.boxes),
            f"{split}/identity": np.concatenate(annotated.identity),
            f"{split}/labeled": np.concatenate(annotated.labeled),
            f"{split}/sizes": sizes[split],
            f"{split}/bytes": file_bytes[split],
        }
    galleries, first = [], 0
    for protocol in protocols:
        index |= {
            f"{protocol.name}/first": first,
            f"{protocol.name}/counts": _counts(protocol.gallery),
            f"{protocol.name}/query_image": protocol.query_image,
            f"{protocol.name}/query_box": protocol.query_box,
            f"{protocol.name}/target_counts": _counts(protocol.target_images),
            f"{protocol.name}/target_images": np.concatenate(protocol.target_images),
            f"{protocol.name}/target_boxes": np.concatenate(protocol.target_boxes),
        }
        galleries.append(np.concatenate(protocol.gallery))
        first += len(galleries[-1])
    np.savez(folder / INDEX, **index)
    np.save(folder / GALLERIES, np.concatenate(galleries))


def clip_to_photos(
    boxes: Float[np.ndarray, "G 4"], sizes: Int[np.ndarray, "G 2"]
) -> tuple[Float[np.ndarray, "G 4"], Bool[np.ndarray, "G"]]:
    """Boxes clipped to photos of (height, width), and which of them still have an area."""
    inside = np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2).astype(np.float32))
    return inside, (inside[:, 2:] > inside[:, :2]).all(axis=1)


def rows_of(
    flat: Shaped[np.ndarray, "E ..."], counts: Int[np.ndarray, "N"]
) -> tuple[Shaped[np.ndarray, "_ ..."], ...]:
    """Rows of so many entries each, laid end to end in `flat`."""
    ends = np.cumsum(counts).tolist()
    return tuple(flat[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True))


def listed(lines: Iterable[str]) -> str:
    """The first ten lines, indented, and how many more there are."""
    lines = list(lines)
    more = [f"and {len(lines) - _LISTED:,} more"] * (len(lines) > _LISTED)
    return "".join(f"\n  {line}" for line in [*lines[:_LISTED], *more])


def _counts(rows: Sequence[Shaped[np.ndarray, "_ ..."]]) -> Int[np.ndarray, "N"]:
    return np.array([len(row) for row in rows], np.int64)
