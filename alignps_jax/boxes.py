"""Arithmetic of axis-aligned boxes.

Boxes are `x1, y1, x2, y2` in continuous coordinates (no `+ 1`), with `x1 <= x2` and `y1 <= y2`.
Distances are left, top, right, bottom: from a location to the sides of a box. Functions are
elementwise over leading axes unless they say otherwise.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.types import AnyArray

NMS_BLOCK = 512  # boxes that `nms` compares with each other at once


def area(boxes: Float[AnyArray, "*N 4"]) -> Float[AnyArray, "*N"]:
    """Width times height."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(a: AnyArray, b: AnyArray) -> AnyArray:
    """Area that two boxes share; leading axes broadcast."""
    xp = a.__array_namespace__()
    low, high = xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:])
    sides = xp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def iou(a: Float[AnyArray, "*#N 4"], b: Float[AnyArray, "*#N 4"]) -> Float[AnyArray, "..."]:
    """Intersection over union of boxes whose leading axes broadcast; 0 for two empty boxes.

    Both are NumPy arrays or both are JAX arrays, and so is the result, in their own precision.
    """
    xp = a.__array_namespace__()
    # XLA would round a product and a sum once, not twice; a maximum between them parts them. Ties
    # between anchors, which decide what the network learns, hang on that.
    shared, one, other = (xp.maximum(x, 0.0) for x in (_intersection(a, b), area(a), area(b)))
    union = one + other - shared
    return xp.where(union > 0, shared / xp.where(union > 0, union, 1.0), 0.0)


def giou(a: Float[Array, "*N 4"], b: Float[Array, "*N 4"]) -> Float[Array, "*N"]:
    """Generalized intersection over union of corresponding boxes (Rezatofighi et al., 2019).

    It lies in [-1, 1]. Union and enclosing area are at least 1e-6, so that values and gradients
    are finite for empty boxes (Released code).
    """
    shared = jnp.asarray(_intersection(a, b))
    union = jnp.maximum(area(a) + area(b) - shared, 1e-6)
    low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    enclosing = jnp.maximum(area(jnp.concatenate([low, high], axis=-1)), 1e-6)
    return shared / union - (enclosing - union) / enclosing


def boxes_from_distances(
    locations: Float[Array, "*N 2"], distances: Float[Array, "*N 4"]
) -> Float[Array, "*N 4"]:
    """Boxes whose sides lie at `distances` from `locations` (x, y), in the same unit."""
    low, high = locations - distances[..., :2], locations + distances[..., 2:]
    return jnp.concatenate([low, high], axis=-1)


def distances_to_boxes(
    locations: Float[Array, "*#N 2"], boxes: Float[AnyArray, "*#N 4"]
) -> Float[Array, "..."]:
    """Inverse of `boxes_from_distances`, negative beyond a side; leading axes broadcast."""
    return jnp.concatenate([locations - boxes[..., :2], boxes[..., 2:] - locations], axis=-1)


def boxes_from_deltas(boxes: Float[Array, "*N 4"], deltas: Float[Array, "*N 4"]) -> Array:
    """Boxes moved by deltas (Faster R-CNN, Ren et al., 2015), at most 1000 / 16 times as large.

    They are the center's way in widths and heights, and the logarithms of the sides' factors.
    """
    side = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., :2] + boxes[..., 2:]) / 2 + side * deltas[..., :2]
    bound = float(np.log(1000 / 16))
    half = side * jnp.exp(jnp.clip(deltas[..., 2:], -bound, bound)) / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def deltas_to_boxes(boxes: Float[Array, "*N 4"], others: Float[Array, "*N 4"]) -> Array:
    """Inverse of `boxes_from_deltas`; not finite for boxes without area."""
    side, other = boxes[..., 2:] - boxes[..., :2], others[..., 2:] - others[..., :2]
    way = (others[..., :2] + others[..., 2:]) / 2 - (boxes[..., :2] + boxes[..., 2:]) / 2
    return jnp.concatenate([way / side, jnp.log(other / side)], axis=-1)


def clip_boxes(boxes: Float[Array, "*N 4"], size: Int[AnyArray, "2"]) -> Float[Array, "*N 4"]:
    """Boxes cut to an image of `size` (height, width): x in [0, width], y in [0, height]."""
    return jnp.clip(boxes, 0.0, jnp.tile(size[::-1], 2).astype(boxes.dtype))


def locations(height: int, width: int, stride: int) -> Float[Array, "{height}*{width} 2"]:
    """Image coordinates (x, y) of a level's locations, row by row: the centers of its cells."""
    x, y = ((jnp.arange(n, dtype=jnp.float32) + 0.5) * stride for n in (width, height))
    return jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)


def nms(
    boxes: Float[Array, "K 4"], valid: Bool[Array, "K"], iou_threshold: float, limit: int
) -> tuple[Int[Array, "{limit}"], Bool[Array, "{limit}"]]:
    """Greedy non-maximum suppression of `boxes`, best first: the first `limit` that are kept.

    A valid box is kept if no kept box before it overlaps it with an IoU above the threshold. Boxes
    are compared in blocks: in one, the rule is applied to all boxes at once until nothing changes,
    as after t rounds the first t answers are final. Returns indices, and which of these are used.
    """
    fill, chunk = -len(boxes) % NMS_BLOCK, min(NMS_BLOCK, limit)
    boxes, valid = jnp.pad(boxes, ((0, fill), (0, 0))), jnp.pad(valid, (0, fill))

    def add_block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, kept, count = state
        rows = start + jnp.arange(NMS_BLOCK)

        def overlaps(others: Int[Array, "M"]) -> Bool[AnyArray, "N M"]:
            # Without a box yet, an entry of `kept` is out of range: empty, it suppresses nothing.
            found = boxes.at[others].get(mode="fill", fill_value=0)
            return iou(boxes[rows][:, None], found) > iou_threshold

        def drop_overlapped(number: Int[Array, ""], free: Bool[Array, "N"]) -> Bool[Array, "N"]:
            some = lax.dynamic_slice_in_dim(kept, number * chunk, chunk)
            return free & ~overlaps(some).any(axis=1)

        free = lax.fori_loop(0, -(-count // chunk), drop_overlapped, valid[rows])
        suppresses = overlaps(rows) & (rows[:, None] < rows)

        def apply_rule(keep: Bool[Array, "N"]) -> Bool[Array, "N"]:
            return free & ~jnp.any(suppresses & keep[:, None], axis=0)

        keep = lax.while_loop(lambda keep: jnp.any(keep != apply_rule(keep)), apply_rule, free)
        total = count + jnp.cumsum(keep, dtype=jnp.int32)
        place = jnp.where(keep, total - 1, limit)
        return start + NMS_BLOCK, kept.at[place].set(rows, mode="drop"), total[-1]

    _, kept, count = lax.while_loop(
        lambda state: (state[0] < len(boxes)) & (state[2] < limit),
        add_block,
        (jnp.int32(0), jnp.full(limit, len(boxes)), jnp.int32(0)),
    )
    used = jnp.arange(limit) < count
    return jnp.where(used, kept, 0), used


def as_stored(
    boxes: Float[np.ndarray, "K 4"], size: tuple[int, int], orientation: int
) -> tuple[Float[np.ndarray, "K 4"], tuple[int, int]]:
    """Boxes of an upright photo of that height and width, and its size, in the pixels as stored.

    `orientation` is that of EXIF (2.3, section 4.6.4): from 5 on rows and columns are exchanged.
    """
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation in (2, 3, 6, 7):
        x = size[1] - x[:, ::-1]
    if orientation in (3, 4, 7, 8):
        y = size[0] - y[:, ::-1]
    stored = (y, x) if orientation > 4 else (x, y)
    return np.stack(stored, axis=2).reshape(-1, 4), size[::-1] if orientation > 4 else size
