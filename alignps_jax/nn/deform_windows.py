"""Deformable sampling and multiplication without gathers: kernels for TPUs, in Pallas.

A TPU reads a row of a table in several cycles and adds to one in tens, one row after another, but
multiplies 65,000 pairs of numbers in one. So the map is cut into blocks of 8 x 16 pixels. What the
locations of a block sample lies in its window, 24 x 32 pixels around it: the samples of a tap are a
matrix, which has the weights of the pixels in every sample, times the window. The transpose of that
matrix takes the gradients back. All of it stays in the chip's vector memory (VMEM).

Corners outside the window of their location count as zero (`deform_blocks.inside_windows`). None is
if the offsets of a 3x3 convolution are -7 to 7 pixels, without 7 itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.nn.deform_blocks import (
    BLOCK,
    SIDE,
    SQUARE,
    WINDOW,
    MapSize,
    chunk_of,
    from_blocks,
    pack_samples,
    squares,
    to_blocks,
    unpack_corners,
    usable_vmem,
)


class _Grid:
    """The steps of a kernel, and what it sees of each array.

    The steps (chunk of channels, image, row of blocks, column of blocks) come one after another.
    With `flush` there is one more row and one more column of steps, which stay at the last block.
    """

    def __init__(self, size: MapSize, kernel: Float[Array, "K C F"], flush: int = 0) -> None:
        self.taps, channels, self.features = kernel.shape
        chunk = chunk_of(size, (self.taps, channels, self.features))
        if chunk is None:
            raise ValueError(f"kernel {kernel.shape} on map {tuple(size)} takes too much VMEM")
        self.chunk, self.chunks = chunk, channels // chunk
        self.images, self.high, self.wide = self.blocks = size.blocks
        self.steps = self.chunks, self.images, self.high + flush, self.wide + flush

    def current(self, i: Any, j: Any) -> tuple[Any, Any]:
        """Row and column of the current block."""
        last = self.wide - 1
        return jnp.minimum(i, self.high - 1), jnp.where(i < self.high, jnp.minimum(j, last), last)

    def block(self, *shape: int) -> pl.BlockSpec:
        """The current block of an array [B, high, wide, *shape]."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec(
            (None, None, None, *shape), lambda c, b, i, j: (b, *self.current(i, j), *zeros)
        )

    def partial(self, *shape: int) -> pl.BlockSpec:
        """The current block of an array [chunks, B, high, wide, *shape]."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec(
            (None, None, None, None, *shape),
            lambda c, b, i, j: (c, b, *self.current(i, j), *zeros),
        )

    def window(self) -> list[pl.BlockSpec]:
        """The squares around the current block, of the map [B, high, 2 * wide, SQUARE, C].

        Three times one, two, and one. Instead of squares outside the map, others inside.
        """

        def spec(row: int, column: int, squares: int) -> pl.BlockSpec:
            def index(c: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
                i, j = self.current(i, j)
                j = j if squares == 2 else jnp.clip(2 * j + column, 0, 2 * self.wide - 1)
                return b, jnp.clip(i + row, 0, self.high - 1), j, 0, c

            return pl.BlockSpec((None, None, squares, SQUARE, self.chunk), index)

        return [spec(row, *columns) for row in (-1, 0, 1) for columns in ((-1, 1), (0, 2), (2, 1))]

    def finished(self) -> pl.BlockSpec:
        """The block of the map to the upper left of the step, to which nothing is added later."""

        def index(c: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
            return b, jnp.maximum(i - 1, 0), jnp.where(i > 0, jnp.maximum(j - 1, 0), 0), 0, c

        return pl.BlockSpec((None, None, None, BLOCK, self.chunk), index)

    def weights(self) -> pl.BlockSpec:
        """The chunk's weights for all taps, [K, C, F]."""
        shape = self.taps, self.chunk, self.features
        return pl.BlockSpec(shape, lambda c, b, i, j: (0, c, 0))

    def call(
        self, kernel: Callable[..., None], products: tuple[int, int], **options: Any
    ) -> Callable[..., Any]:
        """The kernel; `products` of a tap with windows, and with weights, are its cost."""
        blocks, channels = math.prod(self.blocks), self.chunk * self.chunks
        each = 2 * BLOCK * (products[0] * WINDOW + products[1] * self.features)
        return pl.pallas_call(
            kernel,
            grid=self.steps,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary", "arbitrary", "arbitrary"),
                vmem_limit_bytes=usable_vmem(),
            ),
            cost_estimate=pl.CostEstimate(
                flops=blocks * self.taps * channels * each,
                transcendentals=0,
                bytes_accessed=4 * blocks * channels * (WINDOW + BLOCK),
            ),
            **options,
        )


def forward(
    size: MapSize,
    maps: Float[Array, "B H W C"],
    weights: Float[Array, "B h w N"],
    rows: Int[Array, "B h w N"],
    kernel: Float[Array, "K C F"],
    *,
    interpret: bool = False,
) -> Float[Array, "B h w F"]:
    """`deform_sampling.sample_and_multiply` of the corners inside the windows, in float32.

    `weights` and `rows` are those of all taps' first corners, then of their second ones, and so on.
    """
    grid = _Grid(size, kernel)
    out = grid.call(
        _forward_kernel,
        products=(1, 1),
        in_specs=[grid.block(grid.taps, 8, BLOCK), grid.weights(), *grid.window()],
        out_specs=grid.partial(BLOCK, grid.features),
        out_shape=_result(maps, (grid.chunks, *grid.blocks, BLOCK, grid.features)),
        interpret=interpret,
    )(pack_samples(size, weights, rows), kernel, *squares(size, maps))
    return from_blocks(size, out.sum(0))


def _forward_kernel(samples: Any, kernel: Any, *refs: Any) -> None:
    *window, out = refs
    pixels = _read_window(window)

    def add_tap(tap: Any, total: Array) -> Array:
        sampled = _dot(_interpolation(samples[tap], pixels.dtype), pixels, _COLUMNS_COLUMNS)
        return total + _dot(sampled.astype(pixels.dtype), kernel[tap], _ROWS_COLUMNS)

    zeros = jnp.zeros(out.shape, jnp.float32)
    out[...] = lax.fori_loop(0, kernel.shape[0], add_tap, zeros)


def backward(
    size: MapSize,
    maps: Float[Array, "B H W C"],
    weights: Float[Array, "B h w N"],
    rows: Int[Array, "B h w N"],
    kernel: Float[Array, "K C F"],
    d_out: Float[Array, "B h w F"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B h w N"], Float[Array, "K C F"]]:
    """Cotangents of the map, weights and kernel, in float32; zero for corners outside."""
    grid = _Grid(size, kernel, flush=1)
    result = functools.partial(_result, maps)
    d_map, d_corners, d_kernel = grid.call(
        functools.partial(_backward_kernel, grid.high, grid.wide),
        products=(3, 2),
        in_specs=[
            grid.block(grid.taps, 8, BLOCK),
            grid.weights(),
            grid.block(BLOCK, grid.features),
            *grid.window(),
        ],
        out_specs=[grid.finished(), grid.partial(grid.taps, 4, BLOCK), grid.weights()],
        out_shape=[
            result((*grid.blocks, BLOCK, maps.shape[-1])),
            result((grid.chunks, *grid.blocks, grid.taps, 4, BLOCK)),
            result(kernel.shape),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, grid.wide + 2, BLOCK, grid.chunk), jnp.float32),
            pltpu.VMEM((WINDOW, grid.chunk), jnp.float32),
        ],
        interpret=interpret,
    )(
        pack_samples(size, weights, rows),
        kernel,
        to_blocks(size, d_out.astype(maps.dtype)),
        *squares(size, maps),
    )
    return from_blocks(size, d_map), unpack_corners(size, d_corners.sum(0)), d_kernel


def _backward_kernel(
    high: int, wide: int, samples: Any, kernel: Any, d_out: Any, *refs: Any
) -> None:
    """One block's share of the cotangents.

    `sums` holds what three rows of blocks, and one block on either side, have got so far: every
    block of the map is in the windows of nine.
    """
    *window, d_block, d_corners, d_kernel, sums, d_pixels = refs
    b, i, j = (pl.program_id(axis) for axis in (1, 2, 3))

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
        _block_gradients(samples, kernel, d_out, window, d_corners, d_kernel, d_pixels)
        for row in range(3):
            line, start = (i + row + 2) % 3, row * 4 * SQUARE
            sums[line, j, SQUARE:] += d_pixels[start : start + SQUARE]
            sums[line, j + 1] += d_pixels[start + SQUARE : start + 3 * SQUARE]
            sums[line, j + 2, :SQUARE] += d_pixels[start + 3 * SQUARE : start + 4 * SQUARE]

    @pl.when((i > 0) & (j > 0))
    def _() -> None:
        d_block[...] = sums[(i - 1) % 3, j]


def _block_gradients(
    samples: Any,
    kernel: Any,
    d_out: Any,
    window: Sequence[Any],
    d_corners: Any,
    d_kernel: Any,
    d_pixels: Any,
) -> None:
    """Writes the cotangents of a block's corners and of its window; adds to the kernel's."""
    pixels, d_sums = _read_window(window), d_out[...]
    d_pixels[...] = jnp.zeros(d_pixels.shape, jnp.float32)

    def tap(tap: Any, _: Any) -> None:
        matrix = _interpolation(samples[tap], pixels.dtype)
        sampled = _dot(matrix, pixels, _COLUMNS_COLUMNS).astype(pixels.dtype)
        d_kernel[tap] += _dot(sampled, d_sums, _COLUMNS_COLUMNS)
        d_sampled = _dot(d_sums, kernel[tap], _ROWS_ROWS).astype(pixels.dtype)
        d_pixels[...] += _dot(matrix, d_sampled, _ROWS_COLUMNS)
        d_corners[tap] = _corner_gradients(samples[tap], _dot(pixels, d_sampled, _ROWS_ROWS))

    lax.fori_loop(0, kernel.shape[0], tap, None)


def _interpolation(samples: Float[Array, "8 L"], dtype: Any) -> Float[Array, "P L"]:
    """Weight of every pixel of the window in the samples of a tap.

    Pixels are in the order of the squares, [3, 4, SIDE, SIDE].
    """
    row, last_row, column, last_column = (_is_at(samples, place) for place in range(4))

    def in_row(first: int) -> Float[Array, "1 4 1 8 L"]:
        return jnp.where(column, samples[first], 0.0) + jnp.where(
            last_column, samples[first + 1], 0.0
        )

    matrix = jnp.where(row, in_row(4), 0.0) + jnp.where(last_row, in_row(6), 0.0)
    return matrix.reshape(WINDOW, BLOCK).astype(dtype)


def _corner_gradients(
    samples: Float[Array, "8 L"], d_matrix: Float[Array, "P L"]
) -> Float[Array, "4 L"]:
    """The transpose of `_interpolation`."""
    d_matrix = d_matrix.reshape(3, 4, SIDE, SIDE, BLOCK)
    return jnp.stack(
        [
            jnp.where(
                _is_at(samples, 2 + column),
                jnp.where(_is_at(samples, row), d_matrix, 0.0).sum((0, 2), keepdims=True),
                0.0,
            ).sum((0, 1, 2, 3))
            for row in (0, 1)
            for column in (0, 1)
        ]
    )


def _is_at(samples: Float[Array, "8 L"], place: int) -> Bool[Array, "_ _ _ _ L"]:
    """Whether a row (places 0 and 1) or column (2 and 3) of the window is the samples'."""
    if place < 2:
        shape, square, inside = (3, 1, SIDE, 1, BLOCK), 0, 2
    else:
        shape, square, inside = (1, 4, 1, SIDE, BLOCK), 1, 3
    along = [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (square, inside)]
    return (along[0] * SIDE + along[1]).astype(jnp.float32) == samples[place]


def _dot(left: Array, right: Array, dimensions: Any) -> Array:
    """The product in float32; of float32 factors, as precise as JAX is configured."""
    precision = None if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# Over which dimension of the left and of the right factor a product sums.
_ROWS_COLUMNS = (((1,), (0,)), ((), ()))
_COLUMNS_COLUMNS = (((0,), (0,)), ((), ()))
_ROWS_ROWS = (((1,), (1,)), ((), ()))


def _read_window(refs: Sequence[Any]) -> Float[Array, "P C"]:
    return jnp.concatenate([ref[...].reshape(-1, ref.shape[-1]) for ref in refs])


def _result(like: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """float32, varying over the same mesh axes as `like`."""
    return jax.eval_shape(lambda: jnp.zeros_like(like, dtype=jnp.float32, shape=shape))
