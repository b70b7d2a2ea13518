"""How a map, its locations and their samples are laid out in blocks, for `deform_windows.py`.

Corners outside the image count as the nearest pixel inside, with weight 0, as
`deform_sampling.corners` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

# A block is two squares side by side: as many locations as a vector register has lanes (128).
SIDE = 8
SQUARE = SIDE * SIDE
BLOCK = 2 * SQUARE
# A window is three rows of four squares.
WINDOW = 3 * 4 * SQUARE
LANES = 128
# Of v5p and TPU7x, where JAX sees no chip to ask, as ahead of time; v5e and v6e have 128 MiB.
VMEM = 64 * 2**20


class MapSize(NamedTuple):
    """Of the map, and of the output: one location for each pixel."""

    images: int
    height: int
    width: int

    @property
    def blocks(self) -> tuple[int, int, int]:
        return self.images, -(-self.height // SIDE), -(-self.width // (2 * SIDE))


def inside_windows(
    size: MapSize, row: Int[Array, "*locations N"], at: Sequence[Int[Array, "L"]] | None = None
) -> Bool[Array, "*locations N"]:
    """Whether corners, given as rows of the table, are in the windows of their locations.

    Args:
      size: of the map.
      row: the corners.
      at: images, rows and columns of the locations, all [B, h, w] if None.
    """
    y, x = _place(size, row, at)
    return (y >= 0) & (y < 3 * SIDE) & (x >= 0) & (x < 4 * SIDE)


def ends(rows: Int[Array, "B h w N"]) -> Int[Array, "B h w _"]:
    """First and fourth corners; the other two are in their rows and columns."""
    first, _, _, last = jnp.split(rows, 4, axis=-1)
    return jnp.concatenate([first, last], axis=-1)


def _place(
    size: MapSize, row: Int[Array, "*locations N"], at: Sequence[Int[Array, "L"]] | None = None
) -> tuple[Int[Array, "*locations N"], Int[Array, "*locations N"]]:
    """Row and column in its location's window of a row of the table."""
    image, first_y, first_x = _windows(size, at)
    pixel = row - image * (size.height * size.width)
    # A TPU divides integers by a long program. This is exact for maps below 2**22 pixels.
    y = jnp.floor((pixel.astype(jnp.float32) + 0.5) * (1 / size.width)).astype(jnp.int32)
    return y - first_y, pixel - y * size.width - first_x


def _windows(size: MapSize, at: Sequence[Int[Array, "L"]] | None) -> tuple[Array, Array, Array]:
    """Image, first row and first column [..., 1] of the windows of locations, all if None."""
    if at is None:
        at = [lax.broadcasted_iota(jnp.int32, size, axis) for axis in range(3)]
    image, y, x = (place[..., None] for place in at)
    return image, y // SIDE * SIDE - SIDE, x // (2 * SIDE) * (2 * SIDE) - SIDE


def to_blocks(size: MapSize, x: Float[Array, "B h w N"]) -> Float[Array, "B high wide L N"]:
    """Locations block by block, square by square, with zeros where a block leaves the map."""
    images, high, wide = size.blocks
    x = jnp.pad(
        x,
        [(0, 0), (0, high * SIDE - size.height), (0, wide * 2 * SIDE - size.width), (0, 0)],
    )
    x = x.reshape(images, high, SIDE, wide * 2, SIDE, -1).swapaxes(2, 3)
    return x.reshape(images, high, wide, BLOCK, -1)


def from_blocks(size: MapSize, x: Float[Array, "B high wide L N"]) -> Float[Array, "B h w N"]:
    """The inverse of `to_blocks`."""
    images, high, wide = size.blocks
    x = x.reshape(images, high, 2 * wide, SIDE, SIDE, -1).swapaxes(2, 3)
    return x.reshape(images, high * SIDE, wide * 2 * SIDE, -1)[:, : size.height, : size.width]


def pack_samples(
    size: MapSize, weights: Float[Array, "B h w N"], rows: Int[Array, "B h w N"]
) -> Float[Array, "B high wide K 8 L"]:
    """Of every sample: rows, then columns of the first and fourth corner, and the weights."""
    places = [x.astype(jnp.float32) for x in _place(size, ends(rows))]
    x = jnp.concatenate([*places, weights], axis=-1)
    x = to_blocks(size, _swapped(x, 8)).swapaxes(3, 4)
    return x.reshape(*size.blocks, -1, 8, BLOCK)


def unpack_corners(size: MapSize, x: Float[Array, "B high wide K 4 L"]) -> Float[Array, "B h w N"]:
    """What belongs to the corners, as `pack_samples` takes the weights."""
    taps = x.shape[3]
    x = x.reshape(*size.blocks, -1, BLOCK).swapaxes(3, 4)
    return _swapped(from_blocks(size, x), taps)


def _swapped(x: Float[Array, "B h w N"], first: int) -> Float[Array, "B h w N"]:
    """The channels [first, N / first] in the order [N / first, first]."""
    return x.reshape(*x.shape[:-1], first, -1).swapaxes(-2, -1).reshape(x.shape)


def squares(size: MapSize, maps: Float[Array, "B h w C"]) -> list[Float[Array, "B high _ 64 C"]]:
    """The map, once for each array that `deform_windows.forward` reads a window from."""
    images, high, wide = size.blocks
    return [to_blocks(size, maps).reshape(images, high, 2 * wide, SQUARE, -1)] * 9


def usable_vmem() -> int:
    """Bytes of VMEM that a kernel may take."""
    return (pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else VMEM) * 7 // 8


def chunk_of(size: MapSize, kernel: tuple[int, int, int]) -> int | None:
    """How many channels the kernels work on at a time: as many as fit into VMEM, if any do.

    Args:
      size: of the map.
      kernel: taps, channels, features.
    """
    taps, channels, features = kernel
    _, _, wide = size.blocks
    # In float32: weights and their gradient twice, as the next ones are on their way; the map's
    # cotangent; the window twice, and as a value; its cotangent, and some matrices as large.
    per_channel = 4 * taps * features + 3 * (wide + 2) * BLOCK + 6 * WINDOW + 2 * features
    rest = 4 * WINDOW * BLOCK + 4 * BLOCK * features
    parts = [chunk for chunk in range(channels, 0, -1) if channels % chunk == 0]
    fitting = (
        chunk
        for chunk in parts
        if (chunk == channels or chunk % LANES == 0)
        and 4 * (chunk * per_channel + rest) <= usable_vmem()
    )
    return next(fitting, None)
