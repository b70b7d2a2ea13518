"""From a photo to a row of a padded batch: its size, resizing, flipping, and its people's boxes.

Images are RGB `uint8` `[H, W, 3]`, boxes `x1, y1, x2, y2` in pixels, sizes `(height, width)`.
OpenCV resizes because the released code does; rows are filled in place, which saves time.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from alignps_jax.types import Annotations, Batch

Size = tuple[int, int]  # height, width
Scale = tuple[int, int]  # long side, short side
MULTIPLE = 32  # of which the sides of all shapes are one


def is_landscape(size: Size | Int[np.ndarray, "2"]) -> bool:
    """Whether the image is wider than high; a square counts as portrait (as released)."""
    height, width = size
    return bool(width > height)


def rescaled_sizes(
    sizes: Int[np.ndarray, "N 2"], scales: Sequence[Scale]
) -> Int[np.ndarray, "N S 2"]:
    """The largest (height, width) within each of S scales that keep the aspect ratio, rounded.

    Smaller images are enlarged; a side never gets below one pixel (released code).
    """
    long_short = np.sort(sizes)[:, None, ::-1]
    factors = (scales / long_short).min(axis=-1, keepdims=True)
    return np.maximum(1, sizes[:, None] * factors + 0.5).astype(np.int32)


def buckets(scales: Iterable[Scale]) -> tuple[Size, ...]:
    """The shapes to pad to: landscape and portrait per scale, without repeats, smallest first."""
    shapes = set()
    for long, short in scales:
        long_side, short_side = (-(-side // MULTIPLE) * MULTIPLE for side in (long, short))
        shapes |= {(short_side, long_side), (long_side, short_side)}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))


def smallest_bucket(size: Size, shapes: Sequence[Size]) -> Size:
    """The bucket of least area that holds `size`, the first of equals; ValueError if none does."""
    fitting = (shape for shape in shapes if shape[0] >= size[0] and shape[1] >= size[1])
    return min(fitting, key=lambda shape: shape[0] * shape[1])


def empty_batch(rows: int, bucket: Size, people: int) -> Batch:
    """A batch of absent rows; their size is the bucket's, which avoids the mean of no pixel.

    Only the images of rows that stay absent have to be blackened: `fill_image` writes every pixel.
    """
    return Batch(
        image=np.empty((rows, *bucket, 3), np.uint8),
        size=np.full((rows, 2), bucket, np.int32),
        scale=np.ones((rows, 2), np.float32),
        index=np.zeros(rows, np.int32),
        valid_image=np.zeros(rows, bool),
        boxes=np.zeros((rows, people, 4), np.float32),
        identity=np.zeros((rows, people), np.int32),
        labeled=np.zeros((rows, people), bool),
        valid=np.zeros((rows, people), bool),
    )


def fill_image(
    batch: Batch, row: int, image: UInt8[np.ndarray, "H W 3"], size: Size, flip: bool
) -> None:
    """Resizes an image to `size` (bilinear) into the top left corner of a row, then flips it.

    Writes every pixel of the row once (the rest is black): this is the pipeline's inner loop.
    """
    height, width = size
    slot = np.asarray(batch.image[row])
    corner = slot[:height, :width]
    cv2.resize(image, (width, height), dst=corner, interpolation=cv2.INTER_LINEAR)
    if flip:
        cv2.flip(corner, 1, dst=corner)
    slot[:height, width:] = 0
    slot[height:] = 0
    batch.size[row] = size
    batch.scale[row] = width / image.shape[1], height / image.shape[0]
    batch.valid_image[row] = True


def fill_people(
    batch: Batch, row: int, people: Annotations, index: int, size: Size, flip: bool
) -> None:
    """Writes the people of image `index` into a row that already has its scale.

    Boxes are clipped to the resized image; where it is flipped, x becomes width - x.
    """
    height, width = size
    boxes = people.boxes[index].astype(np.float32) * np.tile(np.asarray(batch.scale[row]), 2)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    if flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    count = len(boxes)
    batch.boxes[row, :count] = boxes
    batch.identity[row, :count] = people.identity[index]
    batch.labeled[row, :count] = people.labeled[index]
    batch.valid[row, :count] = True
