"""Online instance matching: the memory, its loss and its update (Paper, Sec. 3.3, Eqs. 1 and 2).

The memory is an argument and a result, never hidden state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.losses.terms import Term
from alignps_jax.types import OIMMemory


def init_memory(num_identities: int, queue_size: int, dim: int) -> OIMMemory:
    """An empty memory: all zero. `queue_size` may be 0."""
    return OIMMemory(
        lut=jnp.zeros((num_identities, dim), jnp.float32),
        queue=jnp.zeros((queue_size, dim), jnp.float32),
        tail=jnp.zeros((), jnp.int32),
    )


def oim_loss(
    embeddings: Float[Array, "P D"],
    identity: Int[Array, "P"],
    labeled: Bool[Array, "P"],
    valid: Bool[Array, "P"],
    memory: OIMMemory,
    *,
    inverse_lut_temperature: float,
    inverse_queue_temperature: float,
    focal_gamma: float,
) -> Term:
    """-(1 - p)^gamma log p of each labeled positive (Paper, Eqs. 1 and 2); counts all positives.

        p_i = exp(v_i . f / tau) / (sum_j exp(v_j . f / tau) + sum_k exp(u_k . f / tau))

    with f the L2-normalized embedding, v the rows of the table, u the slots of the queue, i the
    person's identity. The focal factor is that of Paper, Sec. 4.2; people without identity count
    in the mean (Released code).

    Args:
      embeddings: raw; L2-normalized here.
      identity: row of the table, in [0, L), where `labeled` and `valid`.
      labeled: whether the identity is known.
      valid: False for entries that only fill up P.
      memory: the state before this step's update; receives no gradient.
      inverse_lut_temperature: 1 / tau of Eq. 1 for the table's rows.
      inverse_queue_temperature: the same for the queue's slots.
      focal_gamma: 0 gives the plain OIM loss.
    """
    use = valid & labeled
    table = lax.stop_gradient(
        jnp.concatenate(
            [memory.lut * inverse_lut_temperature, memory.queue * inverse_queue_temperature]
        )
    )
    # Full precision: a GPU's default for matrix products would be off by 1e-2 in the logits.
    logits = jnp.matmul(l2_normalize(embeddings), table.T, precision=lax.Precision.HIGHEST)
    own = jnp.take_along_axis(logits, jnp.where(use, identity, 0)[:, None], axis=1)[:, 0]
    log_p = own - jax.nn.logsumexp(logits, axis=1)
    # Bounded away from 0, where powers below one have no derivative.
    not_p = jnp.maximum(-jnp.expm1(log_p), 1e-12)
    return Term(
        sum=jnp.sum(-(not_p**focal_gamma) * log_p, where=use),
        count=jnp.sum(valid, dtype=jnp.float32),
    )


def update_memory(
    memory: OIMMemory,
    embeddings: Float[Array, "P D"],
    identity: Int[Array, "P"],
    labeled: Bool[Array, "P"],
    valid: Bool[Array, "P"],
    *,
    momentum: float,
    normalize: bool,
    queue_channels: int | None,
) -> OIMMemory:
    """Writes the positives into the memory, one after another, in order.

    A labeled positive turns its identity's row into momentum · row + (1 - momentum) · f, with f
    its L2-normalized embedding; an unlabeled one takes the queue's next slot, circularly.

    Args:
      memory: the state before.
      embeddings: raw, in location order; on several devices the gathered ones of all of them.
      identity: in [0, L) where `labeled` and `valid`; anything else is written nowhere.
      labeled: whether the identity is known.
      valid: False for entries that only fill up P.
      momentum: share of the old row that is kept.
      normalize: scale a row back to length one after every write (OIM paper).
      queue_channels: how many channels of a slot are written, the others keep what they hold (the
        released code writes 64); None writes all.
    """
    # Gradients never reach the memory: it is a record of embeddings, not a parameter.
    features = lax.stop_gradient(l2_normalize(embeddings))
    tail, queue = _update_queue(memory, features, valid & ~labeled, queue_channels)
    lut = _update_lut(memory.lut, features, identity, valid & labeled, momentum, normalize)
    return OIMMemory(lut=lut, queue=queue, tail=tail)


def _update_lut(
    lut: Float[Array, "L D"],
    features: Float[Array, "P D"],
    identity: Int[Array, "P"],
    use: Bool[Array, "P"],
    momentum: float,
    normalize: bool,
) -> Float[Array, "L D"]:
    """All first positives of their identity at once, then all second ones, and so on.

    Rows of different identities do not meet, so this equals the one-by-one order.
    """
    nowhere = lut.shape[0]
    row = jnp.where(use & (identity >= 0) & (identity < nowhere), identity, nowhere)
    order = jnp.argsort(row, stable=True)
    row, features = row[order], features[order]
    rank = jnp.arange(len(row)) - jnp.searchsorted(row, row, side="left", method="scan_unrolled")
    rounds = jnp.max(jnp.where(row < nowhere, rank + 1, 0), initial=0)

    def write(turn: Int[Array, ""], lut: Float[Array, "L D"]) -> Float[Array, "L D"]:
        new = momentum * lut[row] + (1 - momentum) * features
        new = l2_normalize(new) if normalize else new
        return lut.at[jnp.where(rank == turn, row, nowhere)].set(new, mode="drop")

    return lax.fori_loop(0, rounds, write, lut)


def _update_queue(
    memory: OIMMemory,
    features: Float[Array, "P D"],
    use: Bool[Array, "P"],
    channels: int | None,
) -> tuple[Int[Array, ""], Float[Array, "Q D"]]:
    """The new tail and queue; of more positives than slots, the last ones stay."""
    queue, tail = memory.queue, memory.tail
    size = queue.shape[0]
    if size == 0:
        return tail, queue
    rank = jnp.cumsum(use, dtype=jnp.int32) - 1
    count = jnp.sum(use, dtype=jnp.int32)
    stays = use & (rank >= count - size)
    slot = jnp.where(stays, (tail + rank) % size, size)
    queue = queue.at[slot, :channels].set(features[:, :channels], mode="drop")
    return (tail + count) % size, queue
