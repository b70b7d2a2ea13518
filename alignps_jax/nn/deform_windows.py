"""Deformable sampling and multiplication without gathers: kernels for TPUs, in Pallas.

A TPU reads a row of a table in several cycles and adds to one in tens, one row after another, but
multiplies 65,000 pairs of numbers in one. So the map is cut into blocks of 8 x 8 pixels. The samples
of a block's locations come from the block itself and the eight around it, its window; they are the
product of a matrix, which has the interpolation weights of every sample in a row, and the window.
Its transpose takes gradients back. Matrices and samples stay in the chip's vector memory (VMEM).

All corners of all samples must be inside the windows (`inside_windows`): the offsets of a 3x3
convolution may be -7 to 7 pixels, without 7 itself. Corners outside the image count as the nearest
pixel inside, with weight 0, as `deform_sampling.corners` has them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

SIDE = 8  # of a block, in pixels: what a vector register of a TPU has rows
PIXELS = SIDE * SIDE
AROUND = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
WINDOW = len(AROUND) * PIXELS
LANES = 128
# VMEM is 128 MiB on v5e and v6e, 64 MiB on v5p and TPU7x; the compiler's default is 16 MiB.
VMEM_LIMIT = 56 * 2**20
# Of that, what the weights of one chunk of channels take, and their gradient once more.
KERNEL_BYTES = 10 * 2**20


class MapSize(NamedTuple):
    """Of the map, and of the output: one location for each pixel."""

    images: int
    height: int
    width: int

    @property
    def blocks(self) -> tuple[int, int, int]:
        return self.images, -(-self.height // SIDE), -(-self.width // SIDE)


def inside_windows(size: MapSize, rows: Sequence[Int[Array, "M K"]]) -> Bool[Array, ""]:
    """Whether every corner is in the window of its location; `rows` as in `deform_sampling`."""
    inside = [
        (place >= 0) & (place < 3 * SIDE)
        for corner in (rows[0], rows[3])  # the other two are in their rows and columns
        for place in _places(size, corner)
    ]
    return jnp.all(functools.reduce(jnp.logical_and, inside))


def _places(size: MapSize, row: Int[Array, "M K"]) -> tuple[Array, Array]:
    """Pixel row and column, within its location's window, of a row of the table."""
    _, y, x = np.indices(size).reshape(3, -1, 1)
    row = row % (size.height * size.width)
    first_y, first_x = (y // SIDE - 1) * SIDE, (x // SIDE - 1) * SIDE
    return row // size.width - first_y, row % size.width - first_x


def _places_in_window(size: MapSize, row: Int[Array, "M K"]) -> Int[Array, "M K"]:
    """Number, within its location's window, of a row of the table: block by block."""
    y, x = _places(size, row)
    block = y // SIDE * 3 + x // SIDE
    return block * PIXELS + y % SIDE * SIDE + x % SIDE


def _to_blocks(size: MapSize, x: Array, fill: Any = 0) -> Array:
    """[B * H * W, N] -> [B, blocks high, blocks wide, PIXELS, N]."""
    images, high, wide = size.blocks
    x = x.reshape(*size, -1)
    edges = [(0, 0), (0, high * SIDE - size.height), (0, wide * SIDE - size.width), (0, 0)]
    x = jnp.pad(x, edges, constant_values=fill)
    x = x.reshape(images, high, SIDE, wide, SIDE, -1).swapaxes(2, 3)
    return x.reshape(images, high, wide, PIXELS, -1)


def _from_blocks(size: MapSize, x: Array) -> Array:
    """The inverse of `_to_blocks`."""
    images, high, wide = size.blocks
    x = x.reshape(images, high, wide, SIDE, SIDE, -1).swapaxes(2, 3)
    x = x.reshape(images, high * SIDE, wide * SIDE, -1)[:, : size.height, : size.width]
    return x.reshape(-1, x.shape[-1])


def _samples_to_blocks(size: MapSize, corners: Sequence[Array], fill: Any) -> Array:
    """Four [M, K] -> [B, high, wide, 4, K * PIXELS]; of a block, tap after tap."""
    taps = corners[0].shape[1]
    x = _to_blocks(size, jnp.concatenate(corners, axis=1), fill)
    return x.swapaxes(3, 4).reshape(*size.blocks, len(corners), taps * PIXELS)


def _samples_from_blocks(size: MapSize, x: Array) -> tuple[Array, ...]:
    """The inverse of `_samples_to_blocks`."""
    corners = x.shape[3]
    x = x.reshape(*size.blocks, -1, PIXELS).swapaxes(3, 4)
    return tuple(jnp.split(_from_blocks(size, x), corners, axis=1))


def _chunk(kernel: Float[Array, "K C F"]) -> int:
    """How many channels at a time: as many as VMEM has room for weights of."""
    taps, channels, features = kernel.shape
    chunk = channels
    while taps * chunk * features * 4 > KERNEL_BYTES and chunk % (2 * LANES) == 0:
        chunk //= 2
    return chunk


class _Grid:
    """The grid of a kernel, and what it sees of each array.

    The steps (chunk of channels, image, row of blocks, column of blocks) come one after another.
    With `flush` there is one more row and one more column of steps, which stay at the last block.
    """

    def __init__(self, size: MapSize, kernel: Float[Array, "K C F"], flush: int = 0) -> None:
        self.taps, self.channels, self.features = kernel.shape
        self.chunk = _chunk(kernel)
        self.chunks = self.channels // self.chunk
        self.images, self.high, self.wide = self.blocks = size.blocks
        self.steps = self.chunks, self.images, self.high + flush, self.wide + flush
        self.samples = self.taps * PIXELS

    def current(self, i: Any, j: Any) -> tuple[Any, Any]:
        """Row and column of the current block."""
        last = self.wide - 1
        return jnp.minimum(i, self.high - 1), jnp.where(i < self.high, jnp.minimum(j, last), last)

    def block(self, rows: int, columns: int) -> pl.BlockSpec:
        """The current block of an array [B, high, wide, rows, columns]."""
        shape = (None, None, None, rows, columns)
        return pl.BlockSpec(shape, lambda c, b, i, j: (b, *self.current(i, j), 0, 0))

    def chunk_of_block(self, rows: int, columns: int) -> pl.BlockSpec:
        """The current block of an array [chunks, B, high, wide, rows, columns]."""
        shape = (None, None, None, None, rows, columns)
        return pl.BlockSpec(shape, lambda c, b, i, j: (c, b, *self.current(i, j), 0, 0))

    def window(self) -> list[pl.BlockSpec]:
        """The nine blocks around the current one, of the map; inside the map."""

        def spec(row: int, column: int) -> pl.BlockSpec:
            def index(c: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
                i, j = self.current(i, j)
                i, j = jnp.clip(i + row, 0, self.high - 1), jnp.clip(j + column, 0, self.wide - 1)
                return b, i, j, 0, c

            return pl.BlockSpec((None, None, None, PIXELS, self.chunk), index)

        return [spec(row, column) for row, column in AROUND]

    def finished(self) -> pl.BlockSpec:
        """Of the map: the block to the upper left of the current step, which comes last to it."""

        def index(c: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
            return b, jnp.maximum(i - 1, 0), jnp.where(i > 0, jnp.maximum(j - 1, 0), 0), 0, c

        return pl.BlockSpec((None, None, None, PIXELS, self.chunk), index)

    def weights(self) -> pl.BlockSpec:
        """The chunk's weights for all taps, [K, C, F]."""
        shape = (self.taps, self.chunk, self.features)
        return pl.BlockSpec(shape, lambda c, b, i, j: (0, c, 0))

    def call(self, kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=self.steps,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=VMEM_LIMIT
            ),
            **options,
        )


_dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
# Which dimension of the left and of the right factor is summed over.
_ROWS_COLUMNS = (((1,), (0,)), ((), ()))
_COLUMNS_COLUMNS = (((0,), (0,)), ((), ()))
_ROWS_ROWS = (((1,), (1,)), ((), ()))


def _is_corner(places: Int[Array, "4 N"], corner: int) -> Bool[Array, "P N"]:
    """For every pixel of the window and every sample: whether this is that corner of it."""
    pixel = lax.broadcasted_iota(jnp.int32, (WINDOW, places.shape[1]), 0)
    return pixel == places[corner : corner + 1]


def _interpolation(places: Int[Array, "4 N"], weights: Float[Array, "4 N"]) -> Float[Array, "P N"]:
    """Weight of every pixel of the window in every sample."""
    total: Any = sum(
        jnp.where(_is_corner(places, corner), weights[corner : corner + 1], 0.0)
        for corner in range(4)
    )
    return total


def _read_window(blocks: Sequence[Any]) -> Float[Array, "P C"]:
    return jnp.concatenate([block[...] for block in blocks])


def forward(
    size: MapSize,
    table: Float[Array, "R C"],
    weights: Sequence[Float[Array, "M K"]],
    kernel: Float[Array, "K C F"],
    rows: Sequence[Int[Array, "M K"]],
    *,
    interpret: bool = False,
) -> Float[Array, "M F"]:
    """`sample_and_multiply` for corners inside the windows; `size` is that of the map."""
    grid = _Grid(size, kernel)
    blocks = _to_blocks(size, table)
    out = grid.call(
        _forward_kernel,
        in_specs=[
            *[grid.block(4, grid.samples)] * 2,
            grid.weights(),
            *grid.window(),
        ],
        out_specs=grid.chunk_of_block(PIXELS, grid.features),
        out_shape=_result(table, (grid.chunks, *grid.blocks, PIXELS, grid.features)),
        interpret=interpret,
    )(*_samples(size, weights, rows), kernel, *[blocks] * len(AROUND))
    return _from_blocks(size, out.sum(0))


def _forward_kernel(places: Any, weights: Any, kernel: Any, *refs: Any) -> None:
    *window, out = refs
    pixels = _read_window(window)
    matrix = _interpolation(places[...], weights[...]).astype(pixels.dtype)
    samples = _dot(matrix, pixels, _COLUMNS_COLUMNS).astype(pixels.dtype)
    total = jnp.zeros(out.shape, jnp.float32)
    for tap in range(kernel.shape[0]):
        total += _dot(samples[tap * PIXELS : (tap + 1) * PIXELS], kernel[tap], _ROWS_COLUMNS)
    out[...] = total


def backward(
    size: MapSize,
    table: Float[Array, "R C"],
    weights: Sequence[Float[Array, "M K"]],
    kernel: Float[Array, "K C F"],
    rows: Sequence[Int[Array, "M K"]],
    d_out: Float[Array, "M F"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R C"], tuple[Float[Array, "M K"], ...], Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, all in float32."""
    grid = _Grid(size, kernel, flush=1)
    blocks = _to_blocks(size, table)
    result = functools.partial(_result, table)
    d_blocks, d_weights, d_kernel = grid.call(
        functools.partial(_backward_kernel, grid.steps),
        in_specs=[
            *[grid.block(4, grid.samples)] * 2,
            grid.weights(),
            grid.block(PIXELS, grid.features),
            *grid.window(),
        ],
        out_specs=[grid.finished(), grid.chunk_of_block(4, grid.samples), grid.weights()],
        out_shape=[
            result(blocks.shape),
            result((grid.chunks, *grid.blocks, 4, grid.samples)),
            result(kernel.shape),
        ],
        scratch_shapes=[pltpu.VMEM((3, grid.wide + 2, PIXELS, grid.chunk), jnp.float32)],
        interpret=interpret,
    )(
        *_samples(size, weights, rows),
        kernel,
        _to_blocks(size, d_out.astype(table.dtype)),
        *[blocks] * len(AROUND),
    )
    d_weights = _samples_from_blocks(size, d_weights.sum(0))
    return _from_blocks(size, d_blocks), d_weights, d_kernel


def _backward_kernel(
    steps: tuple[int, ...], places: Any, weights: Any, kernel: Any, d_out: Any, *refs: Any
) -> None:
    """One block's share. `sums` holds what three rows of blocks have got so far."""
    *window, d_block, d_weights, d_kernel, sums = refs
    _, b, i, j = (pl.program_id(axis) for axis in range(4))
    _, _, high, wide = (n - (axis > 1) for axis, n in enumerate(steps))

    @pl.when((b == 0) & (i == 0) & (j == 0))
    def _() -> None:
        d_kernel[...] = jnp.zeros(d_kernel.shape, jnp.float32)

    @pl.when((i == 0) & (j == 0))
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when((i > 0) & (j == 0))
    def _() -> None:
        sums[(i + 1) % 3] = jnp.zeros(sums.shape[1:], jnp.float32)

    @pl.when((i < high) & (j < wide))
    def _() -> None:
        d_pixels = _block_gradients(places, weights, kernel, d_out, window, d_weights, d_kernel)
        for part, (row, column) in enumerate(AROUND):
            at = (i + row + 3) % 3, j + column + 1
            sums[at] += d_pixels[part * PIXELS : (part + 1) * PIXELS]

    @pl.when((i > 0) & (j > 0))
    def _() -> None:
        d_block[...] = sums[(i - 1) % 3, j]


def _block_gradients(
    places: Any,
    weights: Any,
    kernel: Any,
    d_out: Any,
    window: Sequence[Any],
    d_weights: Any,
    d_kernel: Any,
) -> Float[Array, "P C"]:
    """Writes a block's `d_weights`, adds to `d_kernel`, and returns the window's cotangent."""
    pixels, d_sums = _read_window(window), d_out[...]
    matrix = _interpolation(places[...], weights[...]).astype(pixels.dtype)
    samples = _dot(matrix, pixels, _COLUMNS_COLUMNS).astype(pixels.dtype)
    parts = []
    for tap in range(kernel.shape[0]):
        parts.append(_dot(d_sums, kernel[tap], _ROWS_ROWS).astype(pixels.dtype))
        tap_samples = samples[tap * PIXELS : (tap + 1) * PIXELS]
        d_kernel[tap] += _dot(tap_samples, d_sums, _COLUMNS_COLUMNS)
    d_samples = jnp.concatenate(parts)
    d_matrix = _dot(pixels, d_samples, _ROWS_ROWS)
    for corner in range(4):
        there = jnp.where(_is_corner(places[...], corner), d_matrix, 0.0)
        d_weights[corner : corner + 1] = there.sum(0, keepdims=True)
    return _dot(matrix, d_samples, _ROWS_COLUMNS)


def _samples(
    size: MapSize, weights: Sequence[Array], rows: Sequence[Array]
) -> tuple[Int[Array, "B h w 4 N"], Float[Array, "B h w 4 N"]]:
    """Places in the window, and weights, of the corners of each block's samples.

    Locations that only fill a block have no place and no weight.
    """
    places = [_places_in_window(size, row) for row in rows]
    return _samples_to_blocks(size, places, -1), _samples_to_blocks(size, weights, 0)


def _result(like: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """float32, varying over the same mesh axes as `like`."""
    return jax.eval_shape(lambda: jnp.zeros_like(like, dtype=jnp.float32, shape=shape))
