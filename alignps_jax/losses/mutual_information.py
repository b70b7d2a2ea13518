"""The branches of ROI-AlignPS agree on identities: a bound on their mutual information."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alignps_jax.arrays import l2_normalize
from alignps_jax.losses.terms import Term
from alignps_jax.types import People, RoiDraws


def mutual_information(
    regions: People,
    dense: People,
    estimate: Callable[[Float[Array, "K D"], Float[Array, "K D"]], Float[Array, "K"]],
    draws: RoiDraws,
    identities: int,
) -> Term:
    """The negative bound of Donsker and Varadhan (MINE, Belghazi et al., 2018).

        L = -0.2 (mean_k T(u_k, v_k) - log mean_k exp T(u_k, v_pi(k)))

    u and v are the normalized mean embeddings of an identity in the regions and in the positive
    locations (`dense`) of all devices, k counts the identities that both have (there are
    `identities`), pi is drawn with replacement, `estimate` is T. In two of three steps T alone
    learns (Released code). Without such an identity, L and its gradient are 0.
    """
    # A row for each identity, none for unknown people: they are dropped.
    size, none = max(identities, 1), len(regions.identity)
    ids, dense_ids = (jnp.where(x.valid & x.labeled, x.identity, size) for x in (regions, dense))
    first = jnp.full(size, none).at[ids].min(jnp.arange(none), mode="drop")
    both_have = jnp.zeros(size, bool).at[dense_ids].set(True, mode="drop")
    first = jnp.where(both_have, first, none)
    identity = jnp.argsort(first)[: len(draws.shuffle)]
    count = jnp.sum(first < none)
    used = jnp.arange(len(identity)) < count
    # The numbers 1 to 99 have the same chance.
    both_learn = (jnp.floor(99 * draws.gate) + 1) % 3 == 0

    def means(people: People, ids: Array) -> Float[Array, "K D"]:
        features = l2_normalize(people.embeddings)
        rows = jnp.zeros((size, features.shape[1])).at[ids].add(features, mode="drop")
        means = l2_normalize(rows[identity])
        return jnp.where(both_learn, means, lax.stop_gradient(means))

    u, v = means(regions, ids), means(dense, dense_ids)
    other = v[jnp.floor(count * draws.shuffle[: len(v)]).astype(jnp.int32)]
    joint = jnp.sum(estimate(u, v), where=used)
    marginal = jax.nn.logsumexp(estimate(u, other), where=used)
    number = jnp.maximum(count, 1)
    loss = -0.2 * (joint / number - (marginal - jnp.log(number)))
    return Term(jnp.where(count > 0, loss, 0.0), jnp.ones(()))
