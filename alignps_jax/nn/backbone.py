"""ResNet backbones that return C3, C4 and C5 (strides 8, 16 and 32)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from alignps_jax.nn.convolution import Map, conv2d, conv_by_rows, shifted
from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.layers import FrozenBatchNorm, GroupNorm, ValidSize, conv, mask_padding, rescale
from alignps_jax.nn.platforms import on_platform

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Pixels of a block of `stem_by_blocks`, in either direction: the stride of the stem.
BLOCK = 4


class Block(nn.Module):
    """Convolutions and a shortcut: 1x1, 3x3 (with the stride), 1x1 (bottleneck), or two of 3x3."""

    bottleneck: bool
    features: int
    stride: int
    project: bool
    norm: Callable[..., nn.Module]
    deformable: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Map, valid_size: ValidSize) -> Float[Array, "B h w D"]:
        conv_ = partial(conv, kernel_init=kaiming, dtype=self.dtype)
        smaller = valid_size // self.stride
        size, first, second = (1, 1, self.stride) if self.bottleneck else (3, self.stride, 1)
        y = conv_(self.features, size, first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, valid_size // first))
        deform = partial(DeformConv, modulated=True, dtype=self.dtype)
        middle = deform if self.deformable else partial(conv_, size=3)
        y = middle(self.features, stride=second, name="conv2")(y)
        y = self.norm(name="bn2")(y, smaller)
        if self.bottleneck:
            y = conv_(4 * self.features, 1, name="conv3")(nn.relu(y))
            y = self.norm(name="bn3")(y, smaller)
        if self.project:
            x = conv_(y.shape[-1], 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, smaller)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of four stages after a stride-4 stem.

    Attributes:
      bottleneck: see `Block`.
      depths: blocks per stage (res2 to res5).
      width: channels of the stem, doubled in every stage.
      stem_size: kernel of the stem's convolution.
      norm: normalization, called with `name`, then on (map, valid_size).
      stride_in_blocks: whether the first block of a stage makes the map smaller, by its 3x3
        convolution (torchvision), or the stage begins with every second pixel of the map before it
        (Released code).
      frozen_stages: stages up to res(1 + n) get no gradient; 0 freezes the stem, -1 nothing.
      deform_stages: stages (3, 4, 5) whose second convolutions are deformable (Table 5).
      remat: the backward pass computes the blocks again.
    """

    bottleneck: bool
    depths: tuple[int, ...]
    width: int
    stem_size: int
    norm: Callable[..., nn.Module]
    stride_in_blocks: bool = True
    frozen_stages: int = -1
    deform_stages: tuple[int, ...] = ()
    remat: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], valid_size: ValidSize
    ) -> tuple[Float[Array, "B _h _w _C"], ...]:
        """Maps an image, zero outside its valid `valid_size`, to C3, C4 and C5."""
        x, valid_size = self._stem(image, valid_size), valid_size // 4
        if self.frozen_stages >= 0:
            x = lax.stop_gradient(x)
        maps = []
        for number in range(len(self.depths)):
            x, valid_size = self.stage(number, x, valid_size)
            if self.frozen_stages > number:
                x = lax.stop_gradient(x)
            maps.append(x)
        return tuple(maps[1:])

    @nn.nowrap
    def stage(self, number: int, x: Map, valid_size: ValidSize) -> tuple[Array, ValidSize]:
        """The blocks of res(2 + number), parts of the module that calls this."""
        for index in range(self.depths[number]):
            stride = 2 if number > 0 and index == 0 else 1
            if stride == 2 and not self.stride_in_blocks:
                # Here, not in the block: what the backward pass keeps of the map is small, too.
                x, valid_size, stride = x[:, ::2, ::2], valid_size // 2, 1
            block = (nn.remat(Block) if self.remat else Block)(
                bottleneck=self.bottleneck,
                features=self.width * 2**number,
                stride=stride,
                project=index == 0,
                norm=self.norm,
                deformable=number + 2 in self.deform_stages,
                dtype=self.dtype,
                name=f"layer{number + 1}_{index}",
            )
            x = block(x, valid_size)
            valid_size = valid_size // stride
        return x, valid_size

    @nn.nowrap
    def _stem(self, image: Float[Array, "B H W 3"], valid_size: ValidSize) -> Map:
        """Convolution, normalization, ReLU and max pooling; by blocks on TPUs for ResNet-50."""
        norm = self.norm(name="bn1")

        def stem(image: Array, kernel: Array, *_: Any, **__: Any) -> Map:
            if not isinstance(norm, FrozenBatchNorm):
                return plain_stem(norm, valid_size, image, kernel)
            affine = norm.affine(self.width)
            plain = partial(plain_stem, partial(rescale, *affine), valid_size)
            by_blocks = partial(stem_by_blocks, affine, valid_size)
            return on_platform(image, kernel, tpu=by_blocks, default=plain)

        return nn.Conv(
            self.width,
            (self.stem_size, self.stem_size),
            use_bias=False,
            kernel_init=kaiming,
            dtype=self.dtype,
            conv_general_dilated=stem,
            name="conv1",
        )(image)

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` (inside the backbone) is never updated."""
        stage = int(path[0][5]) if path[0].startswith("layer") else 0
        return stage <= self.frozen_stages


def max_pool_3x3(x: Map) -> Float[Array, "B h w C"]:
    """Maximum of 3x3 windows with stride 2 and padding 1, of a map without negative values.

    Of shifted maps, because the gradient of a windowed reduction is 10 times slower on a CPU.
    """
    for axis in (1, 2):
        last = (x.shape[axis] - 1) // 2 * 2
        padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        parts = [lax.slice_in_dim(padded, k, k + last + 1, 2, axis) for k in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


def plain_stem(
    norm: Callable[..., Array],
    valid_size: ValidSize,
    image: Float[Array, "B H W 3"],
    kernel: Float[Array, "k k 3 F"],
) -> Float[Array, "B h w F"]:
    """The stem of a ResNet with any normalization."""
    x = nn.relu(norm(conv2d(image, kernel, stride=2), valid_size // 2))
    return mask_padding(max_pool_3x3(x), valid_size // 4)


def stem_by_blocks(
    affine: tuple[Float[Array, "F"], Float[Array, "F"]],
    valid_size: ValidSize,
    image: Float[Array, "B H W 3"],
    kernel: Float[Array, "7 7 3 F"],
) -> Float[Array, "B h w F"]:
    """`plain_stem` with a factor and a shift as normalization, for sizes that 4 divides.

    A TPU computes with vectors of 128 numbers, and an image's three channels fill three of them. A
    block of 4 x 4 pixels has 48 channels: a 7x7 convolution with stride 2 is a 3x3 convolution of
    blocks, with outputs for 2 x 2 places in a block.
    """
    blocks = _blocks(image)
    # Two columns of a block's outputs side by side fill a vector.
    factor, shift = (jnp.tile(x, 2) for x in affine)
    upper, lower = (
        nn.relu(rescale(factor, shift, conv_by_rows(blocks, row), valid_size // BLOCK))
        for row in _kernels_of_blocks(kernel)
    )
    # The window of a block's maximum has all of it, and what is next to it above and to the left.
    column = jnp.maximum(jnp.maximum(upper, lower), shifted(lower, 1, 0))
    left, right = jnp.split(column, 2, axis=-1)
    most = jnp.maximum(jnp.maximum(left, right), shifted(right, 0, 1))
    return mask_padding(most, valid_size // BLOCK)


def _blocks(image: Map) -> Float[Array, "B h w N"]:
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

    def at(row: int, column: int) -> Array:
        # The block's first output is two pixels ahead of the second, and has 3 pixels around it.
        edges = [(1 + 2 * place, 3 * BLOCK - side - 1 - 2 * place) for place in (row, column)]
        placed = jnp.pad(kernel, [*edges, (0, 0), (0, 0)])
        placed = placed.reshape(3, BLOCK, 3, BLOCK, channels, features).swapaxes(1, 2)
        return placed.reshape(3, 3, -1, features)

    return [jnp.concatenate([at(row, 0), at(row, 1)], axis=-1) for row in (0, 1)]


# The last normalization of a block starts at its usual scale: weights come from ImageNet.
ResNet50 = partial(ResNet, bottleneck=True, depths=(3, 4, 6, 3), stem_size=7, norm=FrozenBatchNorm)
# For training from scratch on small scenes: group norm needs no batch and no pretraining.
ResNetSmall = partial(ResNet, bottleneck=False, depths=(1, 1, 1, 1), stem_size=3, norm=GroupNorm)
