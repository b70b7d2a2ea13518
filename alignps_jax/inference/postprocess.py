"""From network outputs to detections, with static shapes and no round trip to the host."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.boxes import boxes_from_distances, clip_boxes, locations, nms
from alignps_jax.types import AnyArray, Detections, Outputs


def detect(
    outputs: Sequence[Outputs],
    size: Int[AnyArray, "B 2"],
    scale: Float[AnyArray, "B 2"],
    *,
    strides: Sequence[int],
    pre_nms: int,
    min_cls_score: float,
    nms_iou: float,
    max_detections: int,
) -> Detections:
    """The detections [B, max_detections] of a batch of images, best first (Released code).

    Per image: the `pre_nms` locations of each level with the highest score, which is classification
    probability times centerness; their boxes, clipped to the image and scaled back to the photo;
    those with a classification probability above `min_cls_score`; non-maximum suppression, where
    boxes overlap by more than `nms_iou` in the photo. `outputs` and `strides` are those of each
    level, `size` height and width without padding, `scale` the factors (x, y) from photo to image.
    """

    def detect_one(levels: tuple[Outputs, ...], size: AnyArray, scale: AnyArray) -> Detections:
        per_level = [
            _level_candidates(level, stride, pre_nms, min_cls_score)
            for level, stride in zip(levels, strides, strict=True)
        ]
        candidates = jax.tree.map(lambda *parts: jnp.concatenate(parts), *per_level)
        boxes = clip_boxes(candidates.boxes, size) / jnp.tile(scale, 2)
        ranked = jnp.where(candidates.valid, -candidates.scores, jnp.inf)
        order = jnp.argsort(ranked, stable=True)
        kept, used = nms(boxes[order], candidates.valid[order], nms_iou, max_detections)
        best = order[kept]
        return _detections(boxes[best], candidates.scores[best], candidates.embeddings[best], used)

    return jax.vmap(detect_one)(tuple(outputs), size, scale)


def embed_boxes(
    outputs: Sequence[Outputs],
    boxes: Float[AnyArray, "B G 4"],
    valid: Bool[AnyArray, "B G"],
    scale: Float[AnyArray, "B 2"],
    *,
    strides: Sequence[int],
    borders: Sequence[float],
) -> Detections:
    """Boxes [B, G] of the network's input as detections, with score 1 and their center's embedding.

    That is the one of the location nearest to the box's center (of two, the right or lower one),
    on the level that the center belongs to in training: the first whose border (of `borders`,
    `config.loss.level_borders`) reaches half of the box's longer side. See `detect`.
    """

    def embed_one(
        levels: tuple[Outputs, ...], boxes: AnyArray, valid: AnyArray, scale: AnyArray
    ) -> Detections:
        low, high = boxes[:, :2], boxes[:, 2:]
        level = jnp.searchsorted(jnp.asarray(borders, jnp.float32), (high - low).max(axis=1) / 2)
        nearest = [
            _nearest_embeddings(outputs, (low + high) / 2, stride)
            for outputs, stride in zip(levels, strides, strict=True)
        ]
        embeddings = jnp.stack(nearest)[level, jnp.arange(len(boxes))]
        ones = jnp.ones(len(boxes), jnp.float32)
        return _detections(boxes / jnp.tile(scale, 2), ones, embeddings, valid)

    return jax.vmap(embed_one)(tuple(outputs), boxes, valid, scale)


def _detections(boxes: AnyArray, scores: Array, embeddings: Array, valid: AnyArray) -> Detections:
    """Detections with embeddings of length one; rows that are not valid are zero."""
    return Detections(
        boxes=jnp.where(valid[:, None], boxes, 0.0),
        scores=jnp.where(valid, scores, 0.0),
        embeddings=jnp.where(valid[:, None], l2_normalize(embeddings), 0.0),
        valid=valid,
    )


def _nearest_embeddings(
    level: Outputs, points: Float[AnyArray, "G 2"], stride: int
) -> Float[Array, "G D"]:
    """Embeddings of one image at the valid locations nearest to points (x, y)."""
    size = jnp.stack([level.valid.any(axis=0).sum(), level.valid.any(axis=1).sum()])
    cell = jnp.floor(points / stride).astype(jnp.int32)
    column, row = jnp.clip(cell, 0, size - 1).T
    return level.embeddings[row, column]


def _level_candidates(level: Outputs, stride: int, limit: int, min_cls_score: float) -> Detections:
    """The `limit` best-scoring locations of one level of one image, in pixels of the input."""
    height, width = level.cls_logits.shape
    cls = jax.nn.sigmoid(level.cls_logits.ravel().astype(jnp.float32))
    scores = cls * jax.nn.sigmoid(level.centerness_logits.ravel().astype(jnp.float32))
    valid = level.valid.ravel()
    _, index = lax.top_k(jnp.where(valid, scores, -1.0), min(limit, height * width))
    distances = level.box_distances.reshape(-1, 4)[index].astype(jnp.float32) * stride
    return Detections(
        boxes=boxes_from_distances(locations(height, width, stride)[index], distances),
        scores=scores[index],
        embeddings=level.embeddings.reshape(height * width, -1)[index],
        valid=(valid & (cls > min_cls_score))[index],
    )
