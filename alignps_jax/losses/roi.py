"""The RoI branch (ROI-AlignPS): its regions, its losses and the random choices of a step.

Numbers without a name are the released settings.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from alignps_jax.boxes import deltas_to_boxes, iou
from alignps_jax.losses.oim import oim_loss
from alignps_jax.losses.rpn import ANCHORS, sample
from alignps_jax.losses.terms import Term
from alignps_jax.types import Batch, OIMMemory, People, RegionOutputs, RoiDraws, Rois


def draw(
    key: PRNGKeyArray, images: Int[Array, "B"], shape: tuple[int, int], candidates: int, most: int
) -> RoiDraws:
    """The numbers of a step's images, which are numbered, too; of `most` identities at most.

    `shape` is that of the C4 map. An anchor, or a candidate, of an image has the same number in any
    share of the batch and in any bucket.
    """
    of_rpn, of_roi, of_gate, of_shuffle = jax.random.split(key, 4)
    fold, uniform = jax.random.fold_in, jax.random.uniform

    def of_image(number: Array) -> tuple[Array, Array]:
        # Each row has its own key: a longer row begins with the numbers of a shorter one.
        row_keys = jax.vmap(fold, (None, 0))(fold(of_rpn, number), jnp.arange(shape[0]))
        rows = jax.vmap(partial(uniform, shape=(shape[1] * ANCHORS,)))(row_keys)
        return rows.ravel(), uniform(fold(of_roi, number), (candidates,))

    rpn, roi = jax.vmap(of_image)(images)
    return RoiDraws(rpn, roi, gate=uniform(of_gate), shuffle=uniform(of_shuffle, (most,)))


def sample_rois(
    boxes: Float[Array, "B P 4"],
    valid: Bool[Array, "B P"],
    batch: Batch,
    draws: Float[Array, "B N"],
    count: int,
) -> Rois:
    """At most `count` regions of each image: of its people and, after these, the proposals `boxes`.

    People are positive, and proposals that have an IoU of at least 0.5 with a person (the one of
    largest IoU, the first of equals); those below 0.1 are negative. `draws` is `RoiDraws.roi`.
    """

    def of_image(boxes: Array, valid: Array, batch: Batch, draws: Array) -> Rois:
        boxes, valid = jnp.append(batch.boxes, boxes, 0), jnp.append(batch.valid, valid)
        overlaps = iou(boxes[:, None], batch.boxes[None])
        overlaps = jnp.where(jnp.eye(len(boxes), len(batch.boxes), dtype=bool), 2.0, overlaps)
        overlaps = jnp.where(valid[:, None] & batch.valid, overlaps, -1.0)
        largest = overlaps.max(axis=1)
        index, positive, used = sample(largest >= 0.5, valid & (largest < 0.1), draws, count)
        person, boxes = jnp.argmax(overlaps[index], axis=1), boxes[index]
        deltas = deltas_to_boxes(boxes, batch.boxes[person]) / jnp.array([0.1, 0.1, 0.2, 0.2])
        return Rois(
            boxes=jnp.where(used[:, None], boxes, 0.0),
            valid=used,
            positive=positive,
            deltas=jnp.where(positive[:, None], deltas, 0.0),
            identity=jnp.where(positive, batch.identity[person], 0),
            labeled=positive & batch.labeled[person],
        )

    return jax.vmap(of_image)(boxes, valid, batch, draws)


def people_of(rois: Rois, embeddings: Float[Array, "B R D"]) -> People:
    """The regions of all images in order; positive ones count."""
    vectors = embeddings.reshape(-1, embeddings.shape[-1])
    return People(rois.positive.ravel(), vectors, rois.identity.ravel(), rois.labeled.ravel())


def roi_terms(
    outputs: RegionOutputs, rois: Rois, memory: OIMMemory, config: ConfigDict
) -> dict[str, Term]:
    """Cross-entropy and L1 of deltas, over all regions, and the OIM loss of the labeled ones.

    `memory` is that before this step's update, `config` is `config.loss`.
    """
    entropies = optax.sigmoid_binary_cross_entropy(outputs.logits, rois.positive)
    errors = jnp.abs(outputs.deltas - rois.deltas).sum(axis=-1)
    count = jnp.sum(rois.valid, dtype=jnp.float32)
    return {
        "roi_cls": Term(jnp.sum(entropies, where=rois.valid), count),
        "roi_box": Term(10 * jnp.sum(errors, where=rois.positive), count),
        "roi_oim": oim_loss(
            people_of(rois, outputs.embeddings),
            memory,
            inverse_lut_temperature=config.roi_inverse_temperature,
            inverse_queue_temperature=config.roi_inverse_temperature,
            focal_gamma=0.0,
            labeled_mean=True,
        ),
    }
