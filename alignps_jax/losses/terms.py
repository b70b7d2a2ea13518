"""The losses, each as a sum and the count to divide it by; the OIM loss is in `oim.py`.

Sums and counts of several devices can be added before the division, so that N devices with b
images give exactly the loss of one device with N·b images. With everything masked, a sum is 0 and
so is its gradient. All arithmetic is float32.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from alignps_jax.arrays import l2_normalize
from alignps_jax.boxes import boxes_from_distances, giou
from alignps_jax.types import Positives

# Maximum number of pairs whose distances are in memory at once: 64 MB.
PAIRS_AT_ONCE = 2**24


@struct.dataclass
class Term:
    """A mean before its division: the loss is `sum / count` (0 when `count` is 0)."""

    sum: Float[Array, ""]
    count: Num[Array, ""]


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
    # With z the logit of the true class, p_t = sigmoid(z): logarithms are finite for any logit.
    z = jnp.where(positive, logits, -logits).astype(jnp.float32)
    weight = jnp.where(positive, alpha, 1 - alpha) * jnp.exp(gamma * jax.nn.log_sigmoid(-z))
    return jnp.sum(-weight * jax.nn.log_sigmoid(z), where=where)


def giou_loss(
    distances: Float[Array, "*P 4"],
    target_distances: Float[Array, "*P 4"],
    target_centerness: Float[Array, "*P"],
    where: Bool[Array, "*P"],
) -> Term:
    """1 - GIoU of the predicted boxes, weighted by the target centerness; count = total weight."""
    # GIoU is invariant to position and scale: boxes around the origin, in units of the stride.
    origin = jnp.zeros((*distances.shape[:-1], 2), jnp.float32)
    predicted = boxes_from_distances(origin, distances.astype(jnp.float32))
    overlap = giou(predicted, boxes_from_distances(origin, target_distances))
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


# Vectors [N, D], their identities (rows of the LUT) [N], and which ones count [N].
_Samples = tuple[Array, Array, Array]


def triplet_loss(
    local: Positives,
    gathered: Positives,
    lut: Float[Array, "L D"] | None,
    *,
    offset: int | Int[Array, ""],
    margin: float,
    first_lut_identity: int,
) -> Term:
    """Batch-hard triplet loss over embeddings and lookup-table rows (Paper, Eq. 3).

        L = mean over anchors of relu(margin + max |a - p| - min |a - n|)

    with p of the anchor's identity and n of another. The samples are the L2-normalized embeddings
    of the labeled positives of all devices and, for each of them, one copy of its identity's row
    of `lut`, as it is and without gradient. Every sample is an anchor, on its own device.
    Without two identities there are no triplets: sum and count are 0.

    Args:
      local: this device's positives; P is at least 1.
      gathered: those of all devices, in device order; `local` itself on one device.
      lut: the table before this step's update; None leaves the rows out ("TOIM w/o LUT").
      offset: index of the first of `local` in `gathered`.
      margin: m of Eq. 3.
      first_lut_identity: rows of smaller identities take no part (Released code: row 0 does not).
    """
    lut = None if lut is None or len(lut) == 0 else lut
    anchors, samples = (_samples(people, lut, first_lut_identity) for people in (local, gathered))
    # Sample k is positive k; with a table, sample k + (number of positives) is the row of k.
    own = offset + jnp.arange(len(local.identity))
    if lut is not None:
        own = jnp.concatenate([own, len(gathered.identity) + own])
    # The hardest pairs are searched without gradient; only their distances are differentiated.
    farthest, nearest, has_negative = _hardest(*lax.stop_gradient((anchors, samples)), own)
    (vectors, _, valid), (others, _, _) = anchors, samples
    excess = margin + _distance(vectors, others[farthest]) - _distance(vectors, others[nearest])
    is_anchor = valid & has_negative
    return Term(
        sum=jnp.sum(jax.nn.relu(excess), where=is_anchor),
        count=jnp.sum(is_anchor, dtype=jnp.float32),
    )


def _samples(positives: Positives, lut: Float[Array, "L D"] | None, first: int) -> _Samples:
    """The normalized embeddings of positives, and after them the table row of each."""
    valid, identity = positives.valid & positives.labeled, positives.identity
    vectors = l2_normalize(positives.embeddings)
    if lut is None:
        return vectors, identity, valid
    rows = lax.stop_gradient(lut)[jnp.where(valid, identity, 0)]
    parts = (vectors, rows), (identity, identity), (valid, valid & (identity >= first))
    vectors, identity, valid = map(jnp.concatenate, parts)
    return vectors, identity, valid


def _hardest(
    anchors: _Samples, samples: _Samples, own: Int[Array, "A"]
) -> tuple[Int[Array, "A"], Int[Array, "A"], Bool[Array, "A"]]:
    """The farthest sample of each anchor's identity, the nearest of another, and if there is one.

    `own` is the index of each anchor among the samples. Anchors are searched in blocks, so that
    memory does not grow with anchors times samples: that would be gigabytes on many devices.
    """
    vectors, identities, valid = samples
    norms = jnp.sum(vectors**2, axis=1)

    def search(anchor: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        vector, identity, own = anchor
        # Full precision: the default of GPUs blurs distances by several percent.
        product = jnp.matmul(vectors, vector, precision=lax.Precision.HIGHEST)
        square = jnp.sum(vector**2) + norms - 2 * product
        square = jnp.where(jnp.arange(len(norms)) == own, 0.0, square)
        same = identities == identity
        farthest = jnp.argmax(jnp.where(same & valid, square, -jnp.inf))
        nearest = jnp.argmin(jnp.where(~same & valid, square, jnp.inf))
        return farthest, nearest, (~same & valid).any()

    return lax.map(search, (*anchors[:2], own), batch_size=max(1, PAIRS_AT_ONCE // len(norms)))


def _distance(a: Float[Array, "N D"], b: Float[Array, "N D"]) -> Float[Array, "N"]:
    """Euclidean distance, at least 1e-6, with zero gradient there (Released code)."""
    return jnp.sqrt(jnp.maximum(jnp.sum((a - b) ** 2, axis=1), 1e-12))
