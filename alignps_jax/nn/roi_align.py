"""RoIAlign: the mean of bilinear samples in each cell of a grid over every box.

Samples lie on a grid, too, so one matrix mixes rows of the map, then another one columns.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SIZE = 14  # rows of cells, and columns
CHUNK = 32  # boxes at a time: mixed rows of 1024 channels of a map of 100 columns take 180 MB

Shares = Float[Array, "R 14 N"]  # of rows or columns of the map in those of cells


def roi_align(
    c4: Float[Array, "H W C"], boxes: Float[Array, "R 4"], valid_size: Int[Array, "2"]
) -> Float[Array, "R 14 14 C"]:
    """Equals `torchvision.ops.roi_align` with `aligned` and its own choice of sample numbers.

    Boxes (in pixels, anywhere) get no gradient. Those without area give zeros. `valid_size` is the
    size of the image's map (stride 16) without its padding.
    """
    boxes = lax.stop_gradient(boxes.astype(jnp.float32)) / 16 - 0.5
    left, top, right, bottom = jnp.moveaxis(boxes, 1, 0)
    rows = _shares(top, bottom - top, valid_size[0], c4.shape[0])
    columns = _shares(left, right - left, valid_size[1], c4.shape[1])

    def means(shares: tuple[Array, Array]) -> Float[Array, "14 14 C"]:
        rows, columns = (x.astype(c4.dtype) for x in shares)
        # Of two matrices: the gradient of `tensordot` takes twice as long on CPUs.
        mixed = (rows @ c4.reshape(len(c4), -1)).reshape(SIZE, *c4.shape[1:])
        return jnp.broadcast_to(columns, (SIZE, *columns.shape)) @ mixed

    # Equal parts: XLA's Triton code finds no tiles for a small rest (H100, float32).
    parts = -(-len(boxes) // CHUNK)
    return lax.map(means, (rows, columns), batch_size=-(-len(boxes) // parts))


def _shares(
    start: Float[Array, "R"], length: Float[Array, "R"], valid: Int[Array, ""], side: int
) -> Shares:
    """Along one axis, of boxes that start and end there."""
    # Divided by `SIZE` where that matters. XLA would multiply by the inverse of a scalar instead,
    # and that rounds differently.
    cell = length / jnp.maximum(SIZE, -length)
    count = jnp.ceil(cell)
    # Accelerators divide with an error in the last place; these products are exact.
    count = count - (SIZE * (count - 1) >= length) + (SIZE * count < length)
    start, cell, count = (x[:, None] for x in (start, cell, count))
    # Not negative; `abs` keeps product and sum apart, which one instruction would round only once.
    starts = start + jnp.abs(jnp.arange(SIZE) * cell)

    def add_sample(index: Int[Array, ""], total: Shares) -> Shares:
        at = starts + (index + 0.5) * cell / count
        inside = (index < count) & (at >= -1) & (at <= valid)
        at = jnp.clip(at, 0, valid - 1)
        near = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(side)), 0)
        return total + jnp.where(inside[..., None], near, 0)

    most = count.max(initial=0).astype(jnp.int32)
    total = lax.fori_loop(0, most, add_sample, jnp.zeros((*starts.shape, side)))
    return total / jnp.maximum(count, 1)[..., None]
