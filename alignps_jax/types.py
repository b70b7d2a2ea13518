"""The types that every module speaks.

Those of `flax.struct` live on devices, others on the host. Images are NHWC RGB `uint8`, boxes
`x1, y1, x2, y2` in pixels, sizes `(height, width)`; boolean arrays say which entries count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from alignps_jax.errors import IncompleteError, UserError, blame  # noqa: F401

# On a device, or on the host.
AnyArray = Array | np.ndarray


@struct.dataclass
class Batch:
    """Images padded into one bucket, with their annotations; boxes in pixels of the resized image.

    `size` is that of the resized photo, `scale` the factors (x, y) by which it was resized, `index`
    its position in the split. Rows that only fill up a last batch are no `valid_image`.
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
    on its padding to a multiple of 32 (Released code).
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
class People:
    """At most P places where people are, in order, with an embedding each and who they are."""

    valid: Bool[Array, "P"]
    embeddings: Float[Array, "P D"]
    identity: Int[Array, "P"]
    labeled: Bool[Array, "P"]


@struct.dataclass
class Positives(People):
    """Positive locations, in order, with predictions and targets."""

    distances: Float[Array, "P 4"]
    centerness_logits: Float[Array, "P"]
    target_distances: Float[Array, "P 4"]
    target_centerness: Float[Array, "P"]


@struct.dataclass
class Rois:
    """Sampled regions of each image, in pixels of the input: positive, then negative ones.

    Both are `valid`; positive ones have a person and `deltas`, divided by their usual sizes.
    """

    boxes: Float[Array, "*B R 4"]
    valid: Bool[Array, "*B R"]
    positive: Bool[Array, "*B R"]
    deltas: Float[Array, "*B R 4"]
    identity: Int[Array, "*B R"]
    labeled: Bool[Array, "*B R"]


@struct.dataclass
class RegionOutputs:
    """A logit, box deltas and an embedding of length one of each region; anchors have none."""

    logits: Float[Array, "B R"]
    deltas: Float[Array, "B R 4"]
    embeddings: Any = None  # [B, R, D]


@struct.dataclass
class RoiDraws:
    """The random choices of a step, uniform in [0, 1); candidates of the smallest are sampled.

    `roi` is of people and, after these, proposals; `gate` and `shuffle` of mutual information.
    """

    rpn: Float[Array, "B A"]
    roi: Float[Array, "B N"]
    gate: Float[Array, ""]
    shuffle: Float[Array, "K"]


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
class Weights:
    """The part of a `TrainState` that inference needs."""

    step: Int[AnyArray, ""]
    params: Any
    frozen: Any


@struct.dataclass
class TrainState(Weights):
    """All that training changes; where `params` are an average, the optimizer updates `raw`."""

    opt_state: Any
    memory: OIMMemory
    raw: Any = None
    roi_memory: Any = None  # an `OIMMemory`, too, if there is an RoI branch


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The people of a split by image; identities count from 0, and `camera` is 0 if unknown."""

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

    `gallery[q]` is in the order of the published evaluation; `target_images[q]` are the images with
    the person, and `target_boxes[q]` the person's box in each.
    """

    name: str
    query_image: Int[np.ndarray, "Q"]
    query_box: Float[np.ndarray, "Q 4"]
    gallery: tuple[Int[np.ndarray, "_"], ...]
    target_images: tuple[Int[np.ndarray, "_"], ...]
    target_boxes: tuple[Float[np.ndarray, "_ 4"], ...]


@dataclasses.dataclass(frozen=True)
class GalleryDetections:
    """Detections of N images; image i owns rows offsets[i]:offsets[i + 1], best score first."""

    names: tuple[str, ...]
    offsets: Int[np.ndarray, "N_plus_1"]
    boxes: Float[np.ndarray, "M 4"]
    scores: Float[np.ndarray, "M"]
    embeddings: Float[np.ndarray, "M D"]

    def of(self, image: int) -> slice:
        """The rows of one image."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def image_of(self, row: int) -> int:
        """The image that owns a row."""
        return int(self.offsets.searchsorted(row, side="right")) - 1
