"""The losses, each as a sum over what counts and the count to divide it by.

Sums and counts of several devices can be added before the division, so that N devices with b
images give exactly the loss of one device with N·b images. With everything masked, a sum is 0 and
so is its gradient. All arithmetic is float32. The OIM loss is in `oim.py`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.boxes import boxes_from_distances, giou


@struct.dataclass
class Term:
    """A mean, not yet divided: the loss is `sum / count` (0 when `count` is 0)."""

    sum: Float[Array, ""]
    count: Float[Array, ""]


def focal_loss(
    logits: Float[Array, "*N"],
    positive: Bool[Array, "*N"],
    where: Bool[Array, "*N"],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, ""]:
    """Sum of the sigmoid focal loss over `where` (Lin et al., 2017).

    Positives weigh `alpha`, others `1 - alpha`. The released code divides the sum by the number
    of positives plus the number of images.
    """
    # With z the logit of the true class: p_t = sigmoid(z) and 1 - p_t = sigmoid(-z), both taken
    # from their logarithms, which stay finite for any logit.
    z = jnp.where(positive, logits, -logits).astype(jnp.float32)
    weight = jnp.where(positive, alpha, 1 - alpha) * jnp.exp(gamma * jax.nn.log_sigmoid(-z))
    return jnp.sum(-weight * jax.nn.log_sigmoid(z), where=where)


def giou_loss(
    distances: Float[Array, "*P 4"],
    target_distances: Float[Array, "*P 4"],
    target_centerness: Float[Array, "*P"],
    where: Bool[Array, "*P"],
) -> Term:
    """1 - GIoU of the predicted boxes, weighted by the target centerness; count = total weight.

    GIoU depends neither on position nor on scale, so both boxes are decoded around the origin, in
    units of the stride.
    """
    origin = jnp.zeros((*distances.shape[:-1], 2), jnp.float32)
    overlap = giou(
        boxes_from_distances(origin, distances.astype(jnp.float32)),
        boxes_from_distances(origin, target_distances),
    )
    return Term(
        sum=jnp.sum((1 - overlap) * target_centerness, where=where),
        count=jnp.sum(target_centerness, where=where),
    )


def centerness_loss(
    logits: Float[Array, "*P"], targets: Float[Array, "*P"], where: Bool[Array, "*P"]
) -> Term:
    """Binary cross-entropy between centerness logits and targets in [0, 1]."""
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    return Term(sum=jnp.sum(losses, where=where), count=jnp.sum(where, dtype=jnp.float32))


def triplet_loss(
    embeddings: Float[Array, "P D"],
    identity: Int[Array, "P"],
    where: Bool[Array, "P"],
    lut: Float[Array, "L D"] | None,
    *,
    margin: float,
    first_lut_identity: int,
) -> Term:
    """Batch-hard triplet loss over embeddings and lookup-table rows (paper, Eq. 3).

    The samples are the L2-normalised embeddings selected by `where` and, for each of them, one
    copy of its identity's row of `lut`, as it is and without gradient. Every sample is an anchor:
    relu(margin + distance to the farthest sample of its identity - distance to the nearest of
    another), Euclidean. Without two identities there are no triplets: sum and count are 0.

    Args:
      embeddings: raw; P is at least 1.
      identity: row of `lut`, in [0, L), where `where`.
      where: the labelled positives.
      lut: the table before this step's update; None leaves the rows out ("TOIM w/o LUT").
      margin: of Eq. 3.
      first_lut_identity: rows of smaller identities take no part (the released code passes over
        identity 0).
    """
    samples, ids, valid = l2_normalize(embeddings), identity, where
    if lut is not None:
        rows = lax.stop_gradient(lut)[jnp.where(where, identity, 0)]
        samples = jnp.concatenate([samples, rows])
        ids = jnp.concatenate([identity, identity])
        valid = jnp.concatenate([where, where & (identity >= first_lut_identity)])

    # The hardest pairs are searched without gradient; only their distances are differentiated.
    square = _pairwise_square_distance(lax.stop_gradient(samples))
    same = ids[:, None] == ids[None]
    farthest = jnp.argmax(jnp.where(same & valid[None], square, -jnp.inf), axis=1)
    different = ~same & valid[None]
    nearest = jnp.argmin(jnp.where(different, square, jnp.inf), axis=1)

    excess = margin + _distance(samples, samples[farthest]) - _distance(samples, samples[nearest])
    is_anchor = valid & different.any(axis=1)
    return Term(
        sum=jnp.sum(jax.nn.relu(excess), where=is_anchor),
        count=jnp.sum(is_anchor, dtype=jnp.float32),
    )


def _pairwise_square_distance(x: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Squared Euclidean distances, up to rounding; zero on the diagonal exactly."""
    # Full precision: a GPU's default for matrix products blurs distances by several percent.
    product = jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    norm = jnp.sum(x * x, axis=1)
    square = norm[:, None] + norm[None] - 2 * product
    return jnp.where(jnp.eye(len(x), dtype=bool), 0.0, square)


def _distance(a: Float[Array, "N D"], b: Float[Array, "N D"]) -> Float[Array, "N"]:
    """Euclidean distance, at least 1e-6, with zero gradient there (released code)."""
    return jnp.sqrt(jnp.maximum(jnp.sum((a - b) ** 2, axis=1), 1e-12))
