"""RoIAlign: the mean of bilinear samples in each cell of a grid over every box.

Samples lie on a grid of their own, so this is separable: rows of the map are mixed by one matrix
and its columns by another. Two products do it, and the gradient is that of two products.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.nn.platforms import on_platform

CHUNK = 32  # boxes at a time: a map's width times the regions' height is 30 MB for each four
MOST_SAMPLES = 1000  # per cell and axis: no box of a photo has more


def roi_align(
    features: Float[Array, "H W C"],
    boxes: Float[Array, "R 4"],
    valid_size: Int[Array, "2"],
    *,
    size: int = 14,
    stride: int = 16,
) -> Float[Array, "R size size C"]:
    """Equals `torchvision.ops.roi_align` with `aligned` and as many samples as a cell has pixels.

    Boxes get no gradient. One without width or height gives zeros.

    Args:
      features: the map of one image.
      boxes: x1, y1, x2, y2 in pixels of the image, anywhere.
      valid_size: height and width of the map without its padding.
      size: cells of the grid in both directions.
      stride: pixels of the image per pixel of the map, a power of two.
    """
    boxes = lax.stop_gradient(boxes.astype(jnp.float32)) / stride - 0.5
    left, top, right, bottom = jnp.moveaxis(boxes, 1, 0)
    rows = _weights(top, bottom - top, valid_size[0], features.shape[0], size)
    columns = _weights(left, right - left, valid_size[1], features.shape[1], size)
    return on_platform(features, rows, columns, default=_products)


def _weights(
    start: Float[Array, "R"], length: Float[Array, "R"], valid: Int[Array, ""], side: int, size: int
) -> Float[Array, "R size side"]:
    """The share of each row (or column) of the map in the mean of each row of cells."""
    # Divided by `size` where that matters. XLA would multiply by the inverse of a scalar instead,
    # and that rounds differently.
    cell = length / jnp.maximum(size, -length)
    count = jnp.ceil(cell)
    # Accelerators divide with an error in the last place; these products are exact.
    count = count - (size * (count - 1) >= length) + (size * count < length)
    count = jnp.clip(count, 0, MOST_SAMPLES)
    start, cell, count = (x[:, None] for x in (start, cell, count))
    starts = start + jnp.arange(size) * cell

    def add(
        index: Int[Array, ""], total: Float[Array, "R size side"]
    ) -> Float[Array, "R size side"]:
        at = starts + (index + 0.5) * cell / count
        inside = (at >= -1) & (at <= valid) & (index < count)
        at = jnp.clip(at, 0, valid - 1)[..., None]
        near = jnp.maximum(1 - jnp.abs(at - jnp.arange(side)), 0)
        return total + jnp.where(inside[..., None], near, 0)

    zeros = jnp.zeros((len(start), size, side))
    total = lax.fori_loop(0, count.max(initial=0).astype(jnp.int32), add, zeros)
    return total / jnp.maximum(count, 1)[..., None]


def _products(
    features: Float[Array, "H W C"],
    rows: Float[Array, "R size H"],
    columns: Float[Array, "R size W"],
) -> Float[Array, "R size size C"]:
    """The mixed rows of some boxes at a time, then their columns."""

    def one(matrices: tuple[Array, Array]) -> Float[Array, "size size C"]:
        rows, columns = (x.astype(features.dtype) for x in matrices)
        mixed = jnp.einsum("ph,hwc->pwc", rows, features)
        return jnp.einsum("qw,pwc->pqc", columns, mixed)

    return lax.map(one, (rows, columns), batch_size=CHUNK)
