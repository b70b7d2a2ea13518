"""The types that every module speaks.

`flax.struct` dataclasses live on devices, standard ones, which hold numpy arrays, on the host.
Everywhere, images are NHWC RGB `uint8`, boxes `x1, y1, x2, y2` in pixels, sizes `(height, width)`,
and a boolean array says which entries count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from alignps_jax.errors import IncompleteError as IncompleteError
from alignps_jax.errors import UserError as UserError
from alignps_jax.errors import blame as blame

# On a device, or on the host.
AnyArray = Array | np.ndarray


@struct.dataclass
class Batch:
    """Images padded into one bucket, with their annotations; boxes in pixels of the resized image.

    `size` is the part of the bucket that came from the photo, `scale` the factors (x, y) by which
    the photo was resized, `index` its position in the split. `valid_image` is False for rows that
    only fill up the last batch of an evaluation.
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

    `box_distances` are left, top, right, bottom in strides. `valid` locations lie on the image, or
    on its padding to a multiple of 32 (Released code); the others are padding of the bucket.
    """

    cls_logits: Float[Array, "B h w"]
    box_distances: Float[Array, "B h w 4"]
    centerness_logits: Float[Array, "B h w"]
    embeddings: Float[Array, "B h w D"]
    valid: Bool[Array, "B h w"]


@struct.dataclass
class Targets:
    """Targets of N locations; only positive ones have a box, at `distances` in strides."""

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
    """All that training changes; where `params` are an average, the optimizer updates `raw`."""

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
    """The people of one split, image by image.

    Where `labeled`, `identity` counts from 0 within the split. `camera` is 0 where there is none.
    """

    names: tuple[str, ...]
    boxes: tuple[Float[np.ndarray, "_ 4"], ...]
    identity: tuple[Int[np.ndarray, "_"], ...]
    labeled: tuple[Bool[np.ndarray, "_"], ...]
    camera: Int[np.ndarray, "N"]

    @property
    def num_identities(self) -> int:
        """1 + the largest labeled identity (0 without any)."""
        rows = zip(self.identity, self.labeled, strict=True)
        return max((int(ids[mask].max()) + 1 for ids, mask in rows if mask.any()), default=0)


@dataclasses.dataclass(frozen=True)
class SearchProtocol:
    """Who is searched, and where: Q queries over the images of one `Annotations`.

    `gallery[q]` lists images in the order of the published evaluation; `target_images[q]` are those
    that hold the person, and `target_boxes[q]` the person's box in each.
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
