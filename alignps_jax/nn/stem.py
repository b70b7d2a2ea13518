"""What comes before the first stage of a ResNet: convolution, normalization, ReLU, max pooling.

A TPU computes with vectors of 128 numbers, and an image's three channels fill three of them. There
the stem of ResNet-50 works on blocks of 4 x 4 pixels, which have 48 channels: a 7x7 convolution
with stride 2 is a 3x3 convolution of blocks, with outputs for 2 x 2 places in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.nn.convolution import conv2d, conv_by_rows, shifted
from alignps_jax.nn.layers import FrozenBatchNorm, mask_padding

# Makes [B, H/4, W/4, F] of image, convolution's kernel, normalization, and valid valid_size.
Stem = Callable[[Array, Array, Any, Array], Array]
# Pixels of a block, in either direction: the stride of the stem.
BLOCK = 4


class Kernel(nn.Module):
    """The kernel of a convolution without bias: the parameter `kernel` [k, k, C, F]."""

    shape: tuple[int, ...]
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self) -> Float[Array, "k k C F"]:
        return self.param("kernel", self.kernel_init, self.shape)


def max_pool_3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum of 3x3 windows with stride 2 and padding 1, of a map without negative values.

    Zeros are then as good a padding as -inf. Written as maxima of shifted maps, whose backward
    pass is elementwise; that of a windowed reduction is 10 times slower on a CPU.
    """
    for axis in (1, 2):
        last = (x.shape[axis] - 1) // 2 * 2
        padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        parts = [lax.slice_in_dim(padded, k, k + last + 1, 2, axis) for k in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


def plain_stem(
    image: Float[Array, "B H W 3"],
    kernel: Float[Array, "k k 3 F"],
    norm: Callable[..., Array],
    valid_size: Int[Array, "B 2"],
) -> Float[Array, "B h w F"]:
    """The stem with any normalization."""
    x = nn.relu(norm(conv2d(image, kernel, stride=2), valid_size // 2))
    return mask_padding(max_pool_3x3(x), valid_size // 4)


def frozen_stem(
    image: Float[Array, "B H W 3"],
    kernel: Float[Array, "7 7 3 F"],
    norm: FrozenBatchNorm,
    valid_size: Int[Array, "B 2"],
) -> Float[Array, "B h w F"]:
    """The stem of ResNet-50, whose normalization is a factor and a shift; by blocks on TPUs."""
    factor, shift = norm.affine(kernel.shape[-1])

    def plain(image: Array, kernel: Array, factor: Array, shift: Array, valid_size: Array) -> Array:
        def scaled(x: Array, valid_size: Array) -> Array:
            return mask_padding((x * factor + shift).astype(x.dtype), valid_size)

        return plain_stem(image, kernel, scaled, valid_size)

    args = image, kernel, factor, shift, valid_size
    return lax.platform_dependent(*args, tpu=stem_by_blocks, default=plain)


def stem_by_blocks(
    image: Float[Array, "B H W 3"],
    kernel: Float[Array, "7 7 3 F"],
    factor: Float[Array, "F"],
    shift: Float[Array, "F"],
    valid_size: Int[Array, "B 2"],
) -> Float[Array, "B h w F"]:
    """`frozen_stem`; height and width of image and valid_size are multiples of four."""
    blocks, (top, bottom) = _blocks(image), _kernels_of_blocks(kernel)
    # Two columns of a block's outputs side by side fill a vector.
    factor, shift = jnp.tile(factor, 2), jnp.tile(shift, 2)

    def row(kernel: Array) -> Array:
        y = conv_by_rows(blocks, kernel)
        return nn.relu(mask_padding((y * factor + shift).astype(image.dtype), valid_size // BLOCK))

    upper, lower = row(top), row(bottom)
    # The window of a block's maximum has all of it, and what is next to it above and to the left.
    column = jnp.maximum(jnp.maximum(upper, lower), shifted(lower, 1, 0))
    left, right = jnp.split(column, 2, axis=-1)
    most = jnp.maximum(jnp.maximum(left, right), shifted(right, 0, 1))
    return mask_padding(most, valid_size // BLOCK)


def _blocks(image: Float[Array, "B H W C"]) -> Float[Array, "B h w N"]:
    """The pixels of every block as channels: row, column, channel."""
    batch, height, width, channels = image.shape
    # To pick every fourth of the numbers in a vector is slow; a product with a matrix of zeros and
    # ones is not, and exact.
    place = BLOCK * jnp.arange(width // BLOCK) + jnp.arange(BLOCK)[:, None]
    chosen = (jnp.arange(width)[:, None, None] == place).astype(image.dtype)
    precision = lax.Precision.HIGHEST if image.dtype == jnp.float32 else None
    x = jnp.einsum("bhwc,wjx->bhcjx", image, chosen, precision=precision)
    x = x.reshape(batch, height // BLOCK, BLOCK, channels, BLOCK, -1)
    x = x.transpose(0, 1, 5, 2, 4, 3)
    return x.reshape(batch, height // BLOCK, width // BLOCK, -1)


def _kernels_of_blocks(kernel: Float[Array, "7 7 C F"]) -> list[Float[Array, "3 3 N 2*F"]]:
    """The kernels for the upper and the lower row of a block's outputs, [left, right] column."""
    side, _, channels, features = kernel.shape
    wide = 3 * BLOCK

    def at(row: int, column: int) -> Array:
        # The block's first output is two pixels ahead of the second, and has 3 pixels around it.
        edges = [(1 + 2 * place, wide - side - 1 - 2 * place) for place in (row, column)]
        placed = jnp.pad(kernel, [*edges, (0, 0), (0, 0)])
        placed = placed.reshape(3, BLOCK, 3, BLOCK, channels, features).swapaxes(1, 2)
        return placed.reshape(3, 3, -1, features)

    return [jnp.concatenate([at(row, 0), at(row, 1)], axis=-1) for row in (0, 1)]
