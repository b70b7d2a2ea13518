"""A prepared data set: encoded photos as TFDS records, and all that is annotated beside them.

Its folder holds the splits `train` and `test` (ArrayRecord files), people, sizes and search
protocols as NumPy files, and `about-2.json`. It may be moved, and the originals may be gone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from alignps_jax.errors import blame
from alignps_jax.types import Annotations, SearchProtocol

# Another number where sets that are older cannot be read.
ABOUT = "about-2.json"
_LISTED = 10
_Arrays = TypeVar("_Arrays")


class About(msgspec.Struct):
    """Where a prepared set comes from.

    `digest` stands for the content of the annotation files, `stamp` for their sizes and times.
    `damaged` has the reason for each photo that cannot be used, by split and name.
    """

    digest: str
    stamp: str
    orientation: str
    protocols: list[str]
    default_protocols: list[str]
    notes: dict[str, list[str]]
    damaged: dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """N photos: people clipped to them, sizes (height, width), and their files by position.

    Any thread may call `encoded`. Where `upright`, sizes and people are those of photos turned as
    their EXIF orientation says.
    """

    annotations: Annotations
    sizes: Int[np.ndarray, "N 2"]
    encoded: Callable[[int], bytes]
    upright: bool = False


@dataclasses.dataclass(frozen=True)
class Photos(Annotations):
    """Also (height, width) and bytes of each photo; -1 bytes of one that cannot be used."""

    sizes: Int[np.ndarray, "N 2"]
    bytes: Int[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set in a folder; it reads as a `Source` does, and has the photos, too."""

    folder: Path
    about: About

    @property
    def train(self) -> Photos:
        """The training images as annotated, people not clipped to the photos."""
        return load_arrays(self.folder, "train", Photos)

    @property
    def test(self) -> Photos:
        """The test images as the published evaluation takes them."""
        return load_arrays(self.folder, "test", Photos)

    @property
    def protocols(self) -> Sequence[str]:
        """Names of the search protocols."""
        return self.about.protocols

    @property
    def default_protocols(self) -> Sequence[str]:
        """The protocols to report when nobody asks for others, the main one first."""
        return self.about.default_protocols

    def protocol(self, name: str) -> SearchProtocol:
        """One of the search protocols, over the images of `test`."""
        return load_arrays(self.folder, name, SearchProtocol)

    def split(self, name: str) -> PreparedSplit:
        """The photos of a split, with the people who can be seen in them."""
        # Here, because inference on photos does without.
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from tensorflow_datasets import decode

        people: Photos = getattr(self, name)
        photo = photo_of_each(people.boxes)
        boxes, seen = clip_to_photos(np.concatenate(people.boxes), people.sizes[photo])
        seen &= people.bytes[photo] >= 0
        records = ArrayRecordDataSource(sorted(self.folder.glob(f"*-{name}.array_record-*")))
        read = partial(features().deserialize_example_np, decoders={"image": decode.SkipDecoding()})
        return PreparedSplit(
            annotations=with_boxes(people, boxes, seen),
            sizes=people.sizes,
            encoded=lambda image: read(records[image])["image"],
            upright=self.about.orientation == "upright",
        )


def features() -> Any:
    """What a record holds; TFDS's own reader would import the classes that a set's files name.

    Boxes x1, y1, x2, y2 are clipped to the photo; `identity` is meaningful where `labeled`.
    """
    from tensorflow_datasets import features

    return features.FeaturesDict(
        {
            "image": features.Image(shape=(None, None, 3)),
            "name": features.Text(),
            "height": np.int32,
            "width": np.int32,
            "boxes": features.Tensor(shape=(None, 4), dtype=np.float32),
            "identity": features.Tensor(shape=(None,), dtype=np.int32),
            "labeled": features.Tensor(shape=(None,), dtype=np.bool_),
            "camera": np.int32,
        }
    )


def prepared_sets(folder: Path) -> list[Prepared]:
    """The complete sets below a folder."""
    found = []
    for path in sorted(folder.glob(f"*/{ABOUT}")):
        with blame(path):
            found.append(Prepared(path.parent, msgspec.json.decode(path.read_bytes(), type=About)))
    return found


def write_about(folder: Path, about: About) -> None:
    """Writes it, complete or not at all."""
    temporary = folder / f"{ABOUT}.part"
    temporary.write_bytes(msgspec.json.encode(about))
    temporary.replace(folder / ABOUT)


def save_arrays(folder: Path, name: str, value: Any) -> None:
    """Writes a dataclass of arrays, of rows of several lengths (laid end to end), and of texts."""
    for field, array in vars(value).items():
        if isinstance(array, tuple) and not isinstance(array[0], str):
            np.save(folder / f"{name}.{field}.counts.npy", [len(row) for row in array])
            array = np.concatenate(array)
        np.save(folder / f"{name}.{field}.npy", array)


def load_arrays(folder: Path, name: str, kind: type[_Arrays]) -> _Arrays:
    """Maps into memory what `save_arrays` wrote."""
    found: dict[str, Any] = {}
    with blame(folder):
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            path = folder / f"{name}.{field.name}.npy"
            array = found[field.name] = np.asarray(np.load(path, mmap_mode="r"))
            if (counts := path.with_suffix(".counts.npy")).exists():
                found[field.name] = _rows(array, np.load(counts))
            elif array.dtype.kind == "U":
                found[field.name] = tuple(array.tolist()) if array.ndim else array.item()
    return kind(**found)


def photo_of_each(boxes: Sequence[Float[np.ndarray, "_ 4"]]) -> Int[np.ndarray, "M"]:
    """The photo of each box, of all boxes laid end to end."""
    return np.repeat(np.arange(len(boxes)), [len(rows) for rows in boxes])


def clip_to_photos(
    boxes: Float[np.ndarray, "M 4"], sizes: Int[np.ndarray, "#M 2"]
) -> tuple[Float[np.ndarray, "M 4"], Bool[np.ndarray, "M"]]:
    """Boxes clipped to photos of (height, width), and which of them still have an area."""
    inside = np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2).astype(np.float32))
    return inside, (inside[:, 2:] > inside[:, :2]).all(axis=1)


def with_boxes(
    people: Annotations, boxes: Float[np.ndarray, "M 4"], keep: Bool[np.ndarray, "M"]
) -> Annotations:
    """The people whom to keep of all, laid end to end, with these boxes."""
    counts = np.bincount(photo_of_each(people.boxes)[keep], minlength=len(people.boxes))
    return dataclasses.replace(
        people,
        boxes=_rows(boxes[keep], counts),
        identity=_rows(np.concatenate(people.identity)[keep], counts),
        labeled=_rows(np.concatenate(people.labeled)[keep], counts),
    )


def listed(lines: Iterable[str]) -> str:
    """The first ten lines, indented, and how many more there are."""
    lines = list(lines)
    more = [f"and {len(lines) - _LISTED:,} more"] * (len(lines) > _LISTED)
    return "".join(f"\n  {line}" for line in [*lines[:_LISTED], *more])


def _rows(
    flat: Shaped[np.ndarray, "M ..."], counts: Int[np.ndarray, "N"]
) -> tuple[Shaped[np.ndarray, "_ ..."], ...]:
    ends = np.cumsum(counts).tolist()
    return tuple(flat[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True))
