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
from jaxtyping import Array, Bool, Float, Int, Num

from alignps_jax.arrays import l2_normalize
from alignps_jax.boxes import boxes_from_distances, giou

# Pairs of anchors and samples whose distances are in memory at once: 64 MB.
PAIRS_AT_ONCE = 2**24


@struct.dataclass
class Term:
    """A mean, not yet divided: the loss is `sum / count` (0 when `count` is 0)."""

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


@struct.dataclass
class People:
    """Raw embeddings of P locations, their identities (rows of the LUT), and which ones count."""

    embeddings: Float[Array, "P D"]
    identity: Int[Array, "P"]
    valid: Bool[Array, "P"]


def triplet_loss(
    mine: People,
    everyone: People,
    lut: Float[Array, "L D"] | None,
    *,
    first: int | Int[Array, ""],
    margin: float,
    first_lut_identity: int,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Term:
    """Batch-hard triplet loss over embeddings and lookup-table rows (Paper, Eq. 3).

        L = mean over anchors of relu(margin + max |a - p| - min |a - n|)

    with p of the anchor's identity and n of another. The samples are the L2-normalized embeddings
    of the labeled positives of all devices and, for each of them, one copy of its identity's row
    of `lut`, as it is and without gradient. Every sample is an anchor; a device takes its own.
    Without two identities there are no triplets: sum and count are 0.

    Args:
      mine: this device's labeled positives; P is at least 1.
      everyone: those of all devices, in device order; `mine` itself on one device.
      lut: the table before this step's update; None leaves the rows out ("TOIM w/o LUT").
      first: where `mine` begins in `everyone`.
      margin: m of Eq. 3.
      first_lut_identity: rows of smaller identities take no part (Released code: row 0 does not).
      pairs_at_once: of how many pairs the distances are in memory at the same time.
    """
    # Every row of the table stands beside its person, so the k-th of all people is sample k, and
    # its row is sample k + (number of people).
    own = first + jnp.arange(len(mine.identity))
    if lut is not None:
        own = jnp.concatenate([own, len(everyone.identity) + own])
    anchors = _with_rows(mine, lut, first_lut_identity)
    samples = _with_rows(everyone, lut, first_lut_identity)
    # The hardest pairs are searched without gradient; only their distances are differentiated.
    farthest, nearest, has_negative = _hardest(
        *lax.stop_gradient((anchors, samples)), own, pairs_at_once
    )
    a, other = anchors.embeddings, samples.embeddings
    excess = margin + _distance(a, other[farthest]) - _distance(a, other[nearest])
    is_anchor = anchors.valid & has_negative
    return Term(
        sum=jnp.sum(jax.nn.relu(excess), where=is_anchor),
        count=jnp.sum(is_anchor, dtype=jnp.float32),
    )


def _with_rows(people: People, lut: Float[Array, "L D"] | None, first_lut_identity: int) -> People:
    """The L2-normalized embeddings, and after them everybody's row of the table."""
    embeddings, identity, valid = l2_normalize(people.embeddings), people.identity, people.valid
    if lut is None:
        return People(embeddings, identity, valid)
    rows = lax.stop_gradient(lut)[jnp.where(valid, identity, 0)]
    return People(
        embeddings=jnp.concatenate([embeddings, rows]),
        identity=jnp.concatenate([identity, identity]),
        valid=jnp.concatenate([valid, valid & (identity >= first_lut_identity)]),
    )


def _hardest(
    anchors: People, samples: People, own: Int[Array, "A"], pairs_at_once: int
) -> tuple[Int[Array, "A"], Int[Array, "A"], Bool[Array, "A"]]:
    """The farthest sample of an anchor's identity, the nearest of another, whether there is one.

    `own` is an anchor's place among the samples. Anchors are searched in blocks, so that memory
    does not grow with the product of anchors and samples: over many devices that is gigabytes.
    """
    norms = jnp.sum(samples.embeddings**2, axis=1)

    def search(
        anchor: Float[Array, "D"], identity: Int[Array, ""], own: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Int[Array, ""], Bool[Array, ""]]:
        # Full precision: a GPU's default for matrix products blurs distances by several percent.
        product = jnp.matmul(samples.embeddings, anchor, precision=lax.Precision.HIGHEST)
        square = jnp.sum(anchor**2) + norms - 2 * product
        square = jnp.where(jnp.arange(len(norms)) == own, 0.0, square)
        same = samples.identity == identity
        different = ~same & samples.valid
        farthest = jnp.argmax(jnp.where(same & samples.valid, square, -jnp.inf))
        nearest = jnp.argmin(jnp.where(different, square, jnp.inf))
        return farthest, nearest, different.any()

    block = max(1, pairs_at_once // len(norms))
    if block >= len(own):
        return jax.vmap(search)(anchors.embeddings, anchors.identity, own)
    each = anchors.embeddings, anchors.identity, own
    return lax.map(lambda anchor: search(*anchor), each, batch_size=block)


def _distance(a: Float[Array, "N D"], b: Float[Array, "N D"]) -> Float[Array, "N"]:
    """Euclidean distance, at least 1e-6, with zero gradient there (Released code)."""
    return jnp.sqrt(jnp.maximum(jnp.sum((a - b) ** 2, axis=1), 1e-12))
