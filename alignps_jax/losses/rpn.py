"""The region proposal network (Faster R-CNN, Ren et al., 2015): what it learns, what it proposes.

Numbers without a name are the released settings of ROI-AlignPS.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.boxes import boxes_from_deltas, clip_boxes, deltas_to_boxes, iou, nms
from alignps_jax.losses.terms import Term
from alignps_jax.types import AnyArray, Batch, RegionOutputs

# Widths and heights of the anchors of a location: 3 ratios (outer), 5 scales (inner).
_ROOTS = np.sqrt(np.array([0.5, 1, 2], np.float32))[:, None]
_SCALES = 16 * np.array([2, 4, 8, 16, 32], np.float32)
_SIDES = np.stack([_SCALES / _ROOTS, _SCALES * _ROOTS], axis=-1).reshape(-1, 2)
ANCHORS = len(_SIDES)
PROPOSALS = 2000  # of an image, the most


def anchors(height: int, width: int) -> Float[Array, "A 4"]:
    """The anchors of a C4 map in pixels, in the order of `RPNHead`."""
    x, y = jnp.meshgrid(16.0 * jnp.arange(width), 16.0 * jnp.arange(height))
    corner = np.concatenate([-_SIDES / 2, _SIDES / 2], axis=1)
    return (jnp.stack([x, y, x, y], axis=-1)[:, :, None] + corner).reshape(-1, 4)


def rpn_terms(
    outputs: RegionOutputs, batch: Batch, width: int, draws: Float[Array, "B A"]
) -> dict[str, Term]:
    """Cross-entropy of 256 sampled anchors of each image, and L1 of the positive ones' deltas.

    `width` is that of the C4 map, `draws` is `RoiDraws.rpn`. Only anchors within the photo count.
    They are positive with an IoU of at least 0.7, and negative below 0.3. But a person with a best
    IoU of at least 0.3 takes all anchors that have it, also from the people before.
    """
    boxes = anchors(outputs.logits.shape[1] // ANCHORS // width, width)

    def of_image(own: RegionOutputs, batch: Batch, draws: Array) -> tuple[Array, Array, Array]:
        inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] < batch.size[::-1]).all(axis=1)
        overlaps = iou(boxes[:, None], batch.boxes[None])
        overlaps = jnp.where(inside[:, None] & batch.valid, overlaps, -1.0)
        taken = overlaps == jnp.maximum(overlaps.max(axis=0), 0.3)
        ranks = jnp.where(taken, 2.0 + jnp.arange(len(batch.boxes)), overlaps)
        largest = ranks.max(axis=1)
        index, positive, used = sample(largest >= 0.7, inside & (largest < 0.3), draws, 256)
        person = jnp.argmax(ranks[index], axis=1)
        targets = deltas_to_boxes(boxes[index], batch.boxes[person])
        errors = jnp.where(positive[:, None], own.deltas[index] - targets, 0.0)
        entropies = optax.sigmoid_binary_cross_entropy(own.logits[index], positive)
        # Without positive or without negative anchors, an image counts one (Released code).
        count = jnp.maximum(positive.sum(), 1) + jnp.maximum((used & ~positive).sum(), 1)
        return jnp.sum(entropies, where=used), jnp.abs(errors).sum(), count

    cls, box, count = map(jnp.sum, jax.vmap(of_image)(outputs, batch, draws))
    return {"rpn_cls": Term(cls, count), "rpn_box": Term(box, count)}


def sample(
    positive: Bool[Array, "N"], negative: Bool[Array, "N"], draws: Float[Array, "N"], count: int
) -> tuple[Int[Array, "S"], Bool[Array, "S"], Bool[Array, "S"]]:
    """At most `count` candidates, at most half of them positive: those of the smallest draws.

    Returns their indices, which of these are positive, and which are used: positive ones come
    first, then negative ones, each in ascending order.
    """

    def smallest(eligible: Bool[Array, "N"], bound: int | Array) -> Bool[Array, "N"]:
        _, index = lax.top_k(jnp.where(eligible, -draws, -jnp.inf), min(count, len(draws)))
        among = jnp.zeros_like(eligible).at[index].set(jnp.arange(len(index)) < bound)
        return eligible & among

    positive = smallest(positive, count // 2)
    negative = smallest(negative, count - positive.sum())
    index = jnp.argsort(jnp.where(positive, 0, jnp.where(negative, 1, 2)))[:count]
    return index, positive[index], (positive | negative)[index]


def propose(
    outputs: RegionOutputs, size: Int[AnyArray, "B 2"], valid_size: Int[AnyArray, "B 2"], width: int
) -> tuple[Float[Array, "B P 4"], Bool[Array, "B P"]]:
    """Boxes of each image without gradient, best first, and which of them are valid.

    Of the 12,000 best anchors within `valid_size` (of the C4 map, whose width is `width`), the
    first that non-maximum suppression keeps, clipped to the photo's `size`. Boxes without area,
    which lay outside of it, are never suppressed (Released code).
    """
    every = anchors(outputs.logits.shape[1] // ANCHORS // width, width)

    def of_image(own: RegionOutputs, size: AnyArray, valid_size: AnyArray) -> tuple[Array, Array]:
        centers = (every[:, :2] + every[:, 2:]) / 2
        valid = (centers < 16 * valid_size[::-1]).all(axis=1)
        scores = jnp.where(valid, jax.nn.sigmoid(own.logits), -1.0)
        scores, best = lax.top_k(scores, min(12000, len(scores)))
        boxes = clip_boxes(boxes_from_deltas(every[best], own.deltas[best]), size)
        kept, used = nms(boxes, scores >= 0, 0.7, PROPOSALS)
        return boxes[kept], used

    return jax.vmap(of_image)(lax.stop_gradient(outputs), size, valid_size)
