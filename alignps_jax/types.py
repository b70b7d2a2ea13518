"""The types that every module speaks.

Device-side types are frozen `flax.struct` dataclasses (pytrees); host-side types are frozen
standard dataclasses that hold numpy arrays. Conventions, everywhere: images are NHWC RGB
`uint8`, boxes are `x1, y1, x2, y2` in pixels, sizes are `(height, width)`, and whether an entry
counts is said by a boolean array, never by a special value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

# Control characters but the line end, other line ends, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_MESSAGE = 1400

# On a device, or on the host.
AnyArray = Array | np.ndarray


@struct.dataclass
class Batch:
    """Images padded into one bucket, with their annotations.

    `size` is the valid height and width of each image inside the bucket (the pixels that came
    from the photo), `scale` the factors (x, y) by which the photo's coordinates were multiplied.
    `index` is the image's position in its split. `valid_image` is False for the rows that only fill
    up the last batch of an evaluation. Boxes are in pixels of the resized image.
    """

    image: UInt8[AnyArray, "B H W 3"]
    size: Int[AnyArray, "B 2"]
    scale: Float[AnyArray, "B 2"]
    index: Int[AnyArray, "B"]
    valid_image: Bool[AnyArray, "B"]
    boxes: Float[AnyArray, "B G 4"]
    identity: Int[AnyArray, "B G"]
    labeled: Bool[AnyArray, "B G"]
    valid: Bool[AnyArray, "B G"]


@struct.dataclass
class Outputs:
    """What the network says at every location of one level.

    `valid` marks the locations that lie on the image (or on its padding to a multiple of 32,
    which the released code feeds to the network as well); the others are bucket padding.
    `box_distances` are left, top, right, bottom in units of the level's stride.
    """

    cls_logits: Float[Array, "B h w"]
    box_distances: Float[Array, "B h w 4"]
    centerness_logits: Float[Array, "B h w"]
    embeddings: Float[Array, "B h w D"]
    valid: Bool[Array, "B h w"]


@struct.dataclass
class Targets:
    """Training targets of N locations of one image (vmap adds the batch).

    `positive` locations carry `distances` (left, top, right, bottom in stride units),
    `centerness`, and the `identity` and `labeled` of their box.
    """

    positive: Bool[Array, "*B N"]
    distances: Float[Array, "*B N 4"]
    centerness: Float[Array, "*B N"]
    identity: Int[Array, "*B N"]
    labeled: Bool[Array, "*B N"]


@struct.dataclass
class Positives:
    """At most P positive locations in location order, with predictions and targets."""

    valid: Bool[Array, "P"]
    distances: Float[Array, "P 4"]
    centerness_logits: Float[Array, "P"]
    embeddings: Float[Array, "P D"]
    target_distances: Float[Array, "P 4"]
    target_centerness: Float[Array, "P"]
    identity: Int[Array, "P"]
    labeled: Bool[Array, "P"]


@struct.dataclass
class Detections:
    """The K best detections of each image, best first; boxes in the photo's own pixels."""

    boxes: Float[AnyArray, "*B K 4"]
    scores: Float[AnyArray, "*B K"]
    embeddings: Float[AnyArray, "*B K D"]
    valid: Bool[AnyArray, "*B K"]


@struct.dataclass
class OIMMemory:
    """Lookup table of labeled identities and circular queue of unlabeled people."""

    lut: Float[Array, "L D"]
    queue: Float[Array, "Q D"]
    tail: Int[Array, ""]


@struct.dataclass
class TrainState:
    """Everything that training changes, and what it needs to resume.

    `params` are what inference takes. Where these are an average over the steps, `raw` are the
    parameters that gradients are of and that the optimizer updates.
    """

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any
    memory: OIMMemory
    raw: Any = None


@struct.dataclass
class Weights:
    """The part of a `TrainState` that inference needs."""

    step: Int[AnyArray, ""]
    params: Any
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The people of one split, image by image (host side, numpy).

    `identity[i]` is contiguous from 0 within the split and meaningful where `labeled[i]`.
    `camera` is the camera's number (0 where the data set has none).
    """

    names: tuple[str, ...]
    boxes: tuple[Float[np.ndarray, "_ 4"], ...]
    identity: tuple[Int[np.ndarray, "_"], ...]
    labeled: tuple[Bool[np.ndarray, "_"], ...]
    camera: Int[np.ndarray, "N"]

    @property
    def num_identities(self) -> int:
        """1 + the largest labeled identity (0 without any)."""
        labeled = [
            ids[mask] for ids, mask in zip(self.identity, self.labeled, strict=True) if mask.any()
        ]
        return int(np.concatenate(labeled).max()) + 1 if labeled else 0


@dataclasses.dataclass(frozen=True)
class SearchProtocol:
    """Who is searched, and where: Q queries over the images of one `Annotations`.

    `gallery[q]` lists the image indices in the order in which the published evaluation visits
    them. `target_images[q]` are the images among them that hold the query person, and
    `target_boxes[q]` the person's box in each.
    """

    name: str
    query_image: Int[np.ndarray, "Q"]
    query_box: Float[np.ndarray, "Q 4"]
    gallery: tuple[Int[np.ndarray, "_"], ...]
    target_images: tuple[Int[np.ndarray, "_"], ...]
    target_boxes: tuple[Float[np.ndarray, "_ 4"], ...]


@dataclasses.dataclass(frozen=True)
class GalleryDetections:
    """Detections of N images laid end to end: image i owns rows offsets[i]:offsets[i + 1].

    Boxes in the photo's pixels, embeddings L2-normalized, rows of an image best score first.
    """

    names: tuple[str, ...]
    offsets: Int[np.ndarray, "N_plus_1"]
    boxes: Float[np.ndarray, "M 4"]
    scores: Float[np.ndarray, "M"]
    embeddings: Float[np.ndarray, "M D"]

    def of(self, image: int) -> slice:
        """The rows of one image."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))


class UserError(ValueError):
    """Bad input: one clear line for the user; `launch.py` prints it and exits with its code.

    Names and values in the message come from files and command lines. What a terminal would act on
    instead of showing it, and what is no character, is escaped here; an endless message is cut.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str):
        shown = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message)
        if len(shown) > _LONGEST_MESSAGE:
            shown = f"{shown[: _LONGEST_MESSAGE - 300]} ... {shown[-290:]}"
        super().__init__(shown)


class IncompleteError(UserError):
    """The work is done and its results are written, but for a part of the input."""

    exit_code = 3


@contextlib.contextmanager
def blame(path: object) -> Iterator[None]:
    """Turns a ValueError about the content of `path`, and nothing else, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
