"""Operations on arrays that several rooms need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def l2_normalize(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Scales vectors to length one, in float32.

    Vectors shorter than 1e-12 become zero and pass no gradient.
    """
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    usable = square > 1e-24
    return jnp.where(usable, x * lax.rsqrt(jnp.where(usable, square, 1.0)), 0.0)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path (params/neck/lateral3/kernel), in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@struct.dataclass
class Selection:
    """At most P chosen entries: `index` is 0 where `valid` is False; `dropped` found no room."""

    index: Int[Array, "P"]
    valid: Bool[Array, "P"]
    dropped: Int[Array, ""]


def first_true(flags: Bool[Array, "N"], size: int) -> Selection:
    """Positions of the first `size` true flags, in order.

    Used to compact the positive locations of a batch, flattened image by image and row by row,
    to a static number. N is at least 1; `size` may exceed it.
    """
    count = jnp.cumsum(flags, dtype=jnp.int32)
    # The k-th true flag is the first position at which the running count reaches k.
    wanted = jnp.arange(1, size + 1, dtype=jnp.int32)
    # Unrolled: a turn of a loop would be four launches on a GPU.
    index = jnp.searchsorted(count, wanted, side="left", method="scan_unrolled").astype(jnp.int32)
    valid = wanted <= count[-1]
    return Selection(
        index=jnp.where(valid, index, 0),
        valid=valid,
        dropped=jnp.maximum(count[-1] - size, 0),
    )
