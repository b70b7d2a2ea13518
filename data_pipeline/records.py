"""What a prepared data set holds, as it is read: encoded photos, their sizes, and their people."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float, Int

from alignps_jax.types import Annotations, UserError

# Beside the records: (height, width) of the photos of each split.
SIZES_FILE = "sizes.json"
_MAX_SIZES_BYTES = 64 << 20


@functools.cache
def features() -> tfds.features.FeaturesDict:
    """One photo with its G people: boxes `x1, y1, x2, y2` in its pixels, clipped to it.

    `identity` is meaningful where `labeled`; `camera` is 0 where the data set has none.
    """
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "name": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "identity": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "labeled": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
            "camera": np.int32,
        }
    )


class StoredImages(Sequence[bytes]):
    """The encoded photos of a prepared split, by position.

    Readable from several threads at once, and picklable: every process opens the files anew.
    """

    def __init__(self, records: Any, folder: Path):
        """Takes the records, and the folder to name where one is damaged (UserError)."""
        self._records = records
        self._folder = folder

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """The bytes of one photo; there are no slices."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a split of {len(self)}")
        with intact(self._folder):
            example = features().deserialize_example_np(
                self._records[index], decoders={"image": tfds.decode.SkipDecoding()}
            )
            return example["image"]


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """N photos: people clipped to them, sizes (height, width), and the encoded bytes."""

    annotations: Annotations
    sizes: Int[np.ndarray, "N 2"]
    jpegs: Sequence[bytes]


def clip_to_photo(
    boxes: Float[np.ndarray, "G 4"], height: int, width: int
) -> tuple[Float[np.ndarray, "G 4"], Bool[np.ndarray, "G"]]:
    """Boxes clipped to a photo, and which of them still have an area."""
    inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return inside, (inside[:, 2:] > inside[:, :2]).all(axis=1)


def clipped(people: Annotations, sizes: Int[np.ndarray, "N 2"]) -> Annotations:
    """The people as their records have them: clipped to their photos, those outside left out."""
    inside = [
        clip_to_photo(boxes, int(height), int(width))
        for boxes, (height, width) in zip(people.boxes, sizes, strict=True)
    ]

    def kept(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(array[keep] for array, (_, keep) in zip(arrays, inside, strict=True))

    return dataclasses.replace(
        people,
        boxes=kept([boxes for boxes, _ in inside]),
        identity=kept(people.identity),
        labeled=kept(people.labeled),
    )


def read_sizes(
    path: Path, split: str, names: Sequence[str], max_pixels: int
) -> Int[np.ndarray, "N 2"]:
    """(height, width) of each photo of a split.

    Raises:
      ValueError: the file does not have them.
      UserError: a photo has more than `max_pixels` pixels.
    """
    if path.stat().st_size > _MAX_SIZES_BYTES:
        raise ValueError(f"{path.name} has more than {_MAX_SIZES_BYTES:,} bytes")
    rows = json.loads(path.read_bytes())[split]
    sizes = np.array(rows)
    sound = sizes.shape == (len(names), 2) and sizes.dtype == np.int64 and (sizes > 0).all()
    if not (sound and (sizes < 2**31).all()):
        raise ValueError(f"{path.name} has no heights and widths of {len(names)} photos")
    pixels = sizes.prod(axis=1)
    if (pixels > max_pixels).any():
        raise UserError(
            f"{path}: {names[int(pixels.argmax())]} has {pixels.max():,} pixels; expected at "
            f"most {max_pixels:,} (data.max_pixels)"
        )
    return sizes.astype(np.int32)


@contextlib.contextmanager
def intact(folder: Path) -> Iterator[None]:
    """Turns what goes wrong with the files of a prepared data set into a UserError.

    TFDS, ArrayRecord and Protocol Buffers raise exceptions of a dozen kinds on damaged files.
    """
    try:
        yield
    except (UserError, OSError):  # what the system says is no damage
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder}: is damaged ({type(error).__name__}: {reason[:120]}); delete it to prepare "
            "the data set again"
        ) from error
