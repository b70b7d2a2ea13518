"""Operations on arrays that several rooms need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Scales vectors to length one, in float32; below 1e-12, to zero and without gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = square > 1e-24
    return jnp.where(usable, x * lax.rsqrt(jnp.where(usable, square, 1.0)), 0.0)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path (params/neck/lateral3/kernel), in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
