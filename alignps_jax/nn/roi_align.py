"""RoIAlign: the mean of bilinear samples in each cell of a grid over every box.

Samples lie on a grid, too, so one matrix mixes rows of the map, then another one columns.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Float, Int

from alignps_jax.nn.platforms import on_platform

SIZE = 14  # rows of cells, and columns
CHUNK = 32  # boxes at a time: mixed rows of 1024 channels of a map of 100 columns take 180 MB
BLOCK = 8  # columns of the map that a CPU multiplies at a time

Map = Float[Array, "H W C"]
Shares = Float[Array, "R 14 N"]  # of rows or columns of the map in those of cells
Means = Float[Array, "R 14 14 C"]


def roi_align(c4: Map, boxes: Float[Array, "R 4"], valid_size: Int[Array, "2"]) -> Means:
    """Equals `torchvision.ops.roi_align` with `aligned` and its own choice of sample numbers.

    Boxes (in pixels, anywhere) get no gradient. Those without area give zeros. `valid_size` is the
    size of the image's map (stride 16) without its padding.
    """
    c4 = jnp.pad(c4, ((0, 0), (0, -c4.shape[1] % BLOCK), (0, 0)))
    boxes = lax.stop_gradient(boxes.astype(jnp.float32)) / 16 - 0.5
    left, top, right, bottom = jnp.moveaxis(boxes, 1, 0)
    rows = _shares(top, bottom - top, valid_size[0], c4.shape[0])
    columns = _shares(left, right - left, valid_size[1], c4.shape[1])
    return on_platform(c4, rows, columns, cpu=_by_blocks, default=_products)


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


def _means(rows: Array, columns: Array, window: Map) -> Float[Array, "14 14 C"]:
    """Those of one box, from the window of the map that its shares [14, H] and [14, W] are of."""
    rows, columns = rows.astype(window.dtype), columns.astype(window.dtype)
    # Of two matrices: the gradient of `tensordot` takes twice as long on CPUs.
    mixed = (rows @ window.reshape(len(window), -1)).reshape(len(rows), *window.shape[1:])
    return jnp.broadcast_to(columns, (len(rows), *columns.shape)) @ mixed


def _products(c4: Map, rows: Shares, columns: Shares) -> Means:
    """From the whole map, some boxes at a time."""
    return lax.map(lambda box: _means(box[0], box[1], c4), (rows, columns), batch_size=CHUNK)


def _by_blocks(c4: Map, rows: Shares, columns: Shares) -> Means:
    """From the blocks of the map's columns that a box needs."""
    features = c4.reshape(len(c4), -1, BLOCK, c4.shape[2]).swapaxes(0, 1)
    columns = columns.reshape(*columns.shape[:2], -1, BLOCK).swapaxes(1, 2)
    used = jnp.any(columns != 0, axis=(2, 3))
    boxes, blocks = jnp.nonzero(used, size=used.size)
    pairs = boxes, blocks, rows[boxes], columns[boxes, blocks], used.sum()
    shape = *rows.shape[:2], rows.shape[1], c4.shape[2]

    def means(pairs: tuple[Array, ...], features: Float[Array, "blocks H BLOCK C"]) -> Means:
        boxes, blocks, rows, columns, count = pairs

        def add(at: Array, out: Means) -> Means:
            return out.at[boxes[at]].add(_means(rows[at], columns[at], features[blocks[at]]))

        return lax.fori_loop(0, count, add, jnp.zeros(shape, c4.dtype))

    def transposed(pairs: tuple[Array, ...], d_out: Means) -> Float[Array, "blocks H BLOCK C"]:
        boxes, blocks, rows, columns, count = pairs

        def add(at: Array, out: Array) -> Array:
            pull = jax.linear_transpose(partial(_means, rows[at], columns[at]), out[0])
            return out.at[blocks[at]].add(pull(d_out[boxes[at]].astype(out.dtype))[0])

        return lax.fori_loop(0, count, add, jnp.zeros(features.shape)).astype(c4.dtype)

    return linear_call(means, transposed, pairs, features)
