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
) -> Term:
    """The negative bound of Donsker and Varadhan (MINE, Belghazi et al., 2018).

        L = -0.2 (mean_k T(u_k, v_k) - log mean_k exp T(u_k, v_pi(k)))

    u and v are the normalized mean embeddings of an identity in the regions and in the positive
    locations (`dense`) of all devices, k counts the identities that both have, pi is drawn with
    replacement, `estimate` is T. In two of three steps T alone learns (Released code). Without such
    an identity, L and its gradient are 0.
    """
    ids, dense_ids = (jnp.where(x.valid & x.labeled, x.identity, -1) for x in (regions, dense))
    is_first = jnp.argmax(ids[:, None] == ids[None], axis=1) == jnp.arange(len(ids))
    common = is_first & (ids >= 0) & jnp.isin(ids, dense_ids)
    identity = ids[jnp.flatnonzero(common, size=len(draws.shuffle), fill_value=0)]
    count = common.sum()
    used = jnp.arange(len(identity)) < count
    # The numbers 1 to 99 have the same chance.
    both_learn = (jnp.floor(99 * draws.gate) + 1) % 3 == 0

    def means(people: People, ids: Array) -> Float[Array, "K D"]:
        own = (used[:, None] & (identity[:, None] == ids[None])).astype(jnp.float32)
        total = jnp.matmul(own, l2_normalize(people.embeddings), precision=lax.Precision.HIGHEST)
        means = l2_normalize(total)
        return jnp.where(both_learn, means, lax.stop_gradient(means))

    u, v = means(regions, ids), means(dense, dense_ids)
    other = v[jnp.floor(count * draws.shuffle).astype(jnp.int32)]
    joint = jnp.sum(estimate(u, v), where=used)
    marginal = jax.nn.logsumexp(estimate(u, other), where=used)
    number = jnp.maximum(count, 1)
    loss = -0.2 * (joint / number - (marginal - jnp.log(number)))
    return Term(jnp.where(count > 0, loss, 0.0), jnp.ones(()))
