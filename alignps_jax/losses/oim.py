"""Online instance matching: the memory, its loss and its update (Paper, Sec. 3.3, Eqs. 1 and 2).

The memory is an argument and a result, never hidden state. Its table and its queue may be empty.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.losses.terms import Term
from alignps_jax.types import OIMMemory, People


def init_memory(num_identities: int, queue_size: int, dim: int) -> OIMMemory:
    """An empty memory: all zero."""
    return OIMMemory(
        lut=jnp.zeros((num_identities, dim), jnp.float32),
        queue=jnp.zeros((queue_size, dim), jnp.float32),
        tail=jnp.zeros((), jnp.int32),
    )


def oim_loss(
    positives: People,
    memory: OIMMemory,
    *,
    inverse_lut_temperature: float,
    inverse_queue_temperature: float,
    focal_gamma: float,
    labeled_mean: bool = False,
) -> Term:
    """-(1 - p)^gamma log p of each labeled positive (Paper, Eqs. 1 and 2); counts all positives.

        p_i = exp(v_i . f / tau) / (sum_j exp(v_j . f / tau) + sum_k exp(u_k . f / tau))

    with f the L2-normalized embedding, v the rows of the table, u the slots of the queue, i the
    person's identity. The focal factor is that of Paper, Sec. 4.2; unlabeled people count in the
    mean (Released code).

    Args:
      positives: raw embeddings, and identities in [0, L) where `labeled` and `valid`.
      memory: the state before this step's update; receives no gradient.
      inverse_lut_temperature: 1 / tau of Eq. 1 for the table's rows.
      inverse_queue_temperature: the same for the queue's slots.
      focal_gamma: 0 gives the plain OIM loss.
      labeled_mean: count labeled positives only (ROI-AlignPS).
    """
    use = positives.valid & positives.labeled
    count = jnp.sum(use if labeled_mean else positives.valid, dtype=jnp.float32)
    if len(memory.lut) == 0:  # the training set has no labeled people
        return Term(sum=jnp.zeros(()), count=count)
    rows, slots = memory.lut * inverse_lut_temperature, memory.queue * inverse_queue_temperature
    table = lax.stop_gradient(jnp.concatenate([rows, slots]))
    features = l2_normalize(positives.embeddings)
    # Full precision: the default of GPUs would be off by 1e-2 in the logits.
    logits = jnp.matmul(features, table.T, precision=lax.Precision.HIGHEST)
    identity = jnp.where(use, positives.identity, 0)
    own = jnp.take_along_axis(logits, identity[:, None], axis=1)[:, 0]
    log_p = own - jax.nn.logsumexp(logits, axis=1)
    # Bounded away from 0, where powers below one have no derivative.
    not_p = jnp.maximum(-jnp.expm1(log_p), 1e-12)
    return Term(sum=jnp.sum(-(not_p**focal_gamma) * log_p, where=use), count=count)


def update_memory(
    memory: OIMMemory,
    positives: People,
    *,
    momentum: float,
    normalize: bool,
    queue_channels: int | None,
) -> OIMMemory:
    """Writes the positives of all devices into the memory, one after another, in order.

    A labeled positive turns its identity's row into momentum · row + (1 - momentum) · f, with f
    its L2-normalized embedding; an unlabeled one takes the queue's next slot, circularly.

    Args:
      memory: the state before.
      positives: in order; identities outside of [0, L) are written nowhere.
      momentum: share of the old row that is kept.
      normalize: scale a row back to length one after every write (OIM paper).
      queue_channels: number of channels of a slot that are written, the others keep their values
        (Released code: 64); None writes all.
    """
    features, valid = l2_normalize(positives.embeddings), positives.valid
    row = jnp.where(valid & positives.labeled, positives.identity, -1)
    lut = _update_lut(memory.lut, features, row, momentum, normalize)
    queue, tail, size = memory.queue, memory.tail, len(memory.queue)
    if size > 0:
        use = valid & ~positives.labeled
        rank = jnp.cumsum(use, dtype=jnp.int32) - 1
        count = jnp.sum(use, dtype=jnp.int32)
        stays = use & (rank >= count - size)  # the last ones, where they are more than the slots
        slot = jnp.where(stays, (tail + rank) % size, size)
        queue = queue.at[slot, :queue_channels].set(features[:, :queue_channels], mode="drop")
        tail = (tail + count) % size
    return OIMMemory(lut=lut, queue=queue, tail=tail)


def _update_lut(
    lut: Float[Array, "L D"],
    features: Float[Array, "P D"],
    row: Int[Array, "P"],
    momentum: float,
    normalize: bool,
) -> Float[Array, "L D"]:
    """The first positives of all identities at once, then the second ones, and so on.

    Different identities write different rows, so this equals the one-by-one order.
    """
    nowhere = len(lut)
    if nowhere == 0:
        return lut
    row = jnp.where((row >= 0) & (row < nowhere), row, nowhere)
    order = jnp.argsort(row, stable=True)
    row, features = row[order], features[order]
    rank = jnp.arange(len(row)) - jnp.searchsorted(row, row, side="left", method="scan_unrolled")
    rounds = jnp.max(jnp.where(row < nowhere, rank + 1, 0), initial=0)

    def write(turn: Int[Array, ""], lut: Float[Array, "L D"]) -> Float[Array, "L D"]:
        new = momentum * lut[row] + (1 - momentum) * features
        new = l2_normalize(new) if normalize else new
        return lut.at[jnp.where(rank == turn, row, nowhere)].set(new, mode="drop")

    return lax.fori_loop(0, rounds, write, lut)
