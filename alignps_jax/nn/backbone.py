"""ResNet backbones that return C3, C4 and C5 (strides 8, 16 and 32)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from alignps_jax.nn.deform_conv import ModulatedDeformConv
from alignps_jax.nn.layers import FrozenBatchNorm, GroupNorm, conv
from alignps_jax.nn.stem import Kernel, Stem, frozen_stem, plain_stem

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a shortcut."""

    features: int
    stride: int
    project: bool
    norm: Callable[..., nn.Module]
    deformable: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], valid_size: Int[Array, "B 2"]
    ) -> Float[Array, "B h w D"]:
        conv_ = partial(conv, kernel_init=kaiming, dtype=self.dtype)
        y = nn.relu(self.norm(name="bn1")(conv_(self.features, 1, name="conv1")(x), valid_size))
        if self.deformable:
            conv2: nn.Module = ModulatedDeformConv(
                self.features, stride=self.stride, dtype=self.dtype, name="conv2"
            )
        else:
            conv2 = conv_(self.features, 3, self.stride, name="conv2")
        valid_size = valid_size // self.stride
        y = nn.relu(self.norm(name="bn2")(conv2(y), valid_size))
        y = self.norm(name="bn3")(conv_(4 * self.features, 1, name="conv3")(y), valid_size)
        if self.project:
            x = conv_(4 * self.features, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, valid_size)
        return nn.relu(x + y)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    features: int
    stride: int
    project: bool
    norm: Callable[..., nn.Module]
    deformable: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], valid_size: Int[Array, "B 2"]
    ) -> Float[Array, "B h w D"]:
        conv_ = partial(conv, kernel_init=kaiming, dtype=self.dtype)
        valid_size = valid_size // self.stride
        y = conv_(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, valid_size))
        if self.deformable:
            conv2: nn.Module = ModulatedDeformConv(self.features, dtype=self.dtype, name="conv2")
        else:
            conv2 = conv_(self.features, 3, name="conv2")
        y = self.norm(name="bn2")(conv2(y), valid_size)
        if self.project:
            x = conv_(self.features, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, valid_size)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of four stages after a stride-4 stem.

    Attributes:
      block: residual block, with everything but width, stride and shortcut bound.
      depths: blocks per stage (res2 to res5).
      width: channels of the stem, doubled in every stage.
      stem_size: kernel of the stem's convolution.
      stem: what becomes of the image before the stages; see `stem.py`.
      norm: normalization, called with `name`, then on (map, valid_size).
      stride_in_blocks: whether the first block of a stage makes the map smaller, by its 3x3
        convolution (torchvision), or the stage begins with every second pixel of the map before it
        (Caffe, Released code: there the strides are those of 1x1 convolutions).
      frozen_stages: stages up to res(1 + n) get no gradient; 0 freezes the stem, -1 nothing.
      deform_stages: stages (3, 4, 5) whose 3x3 convolutions are deformable (Table 5).
    """

    block: Callable[..., nn.Module]
    depths: tuple[int, ...]
    width: int
    stem_size: int
    norm: Callable[..., nn.Module]
    stem: Stem = plain_stem
    stride_in_blocks: bool = True
    frozen_stages: int = -1
    deform_stages: tuple[int, ...] = ()
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], valid_size: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B _h _w _C"], ...]:
        """Maps an image, zero outside its valid `valid_size`, to C3, C4 and C5."""
        shape = (self.stem_size, self.stem_size, image.shape[-1], self.width)
        kernel = Kernel(shape, kaiming, name="conv1")().astype(self.dtype)
        if self.frozen_stages >= 0:
            kernel = lax.stop_gradient(kernel)
        x = self.stem(image.astype(self.dtype), kernel, self.norm(name="bn1"), valid_size)
        valid_size = valid_size // 4
        if self.frozen_stages >= 0:
            x = lax.stop_gradient(x)
        maps = []
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                if stride == 2 and not self.stride_in_blocks:
                    # Here, not in the block: what the backward pass keeps of the map is small, too.
                    x, valid_size, stride = x[:, ::2, ::2], valid_size // 2, 1
                block = self.block(
                    features=self.width * 2**stage,
                    stride=stride,
                    project=index == 0,
                    norm=self.norm,
                    deformable=stage + 2 in self.deform_stages,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )
                x = block(x, valid_size)
                valid_size = valid_size // stride
            if self.frozen_stages > stage:
                x = lax.stop_gradient(x)
            maps.append(x)
        return tuple(maps[1:])

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` (inside the backbone) is never updated."""
        stage = int(path[0][5]) if path[0].startswith("layer") else 0
        return stage <= self.frozen_stages


# The last normalization of a block starts at its usual scale: weights come from ImageNet.
ResNet50 = partial(
    ResNet,
    block=BottleneckBlock,
    depths=(3, 4, 6, 3),
    stem_size=7,
    norm=FrozenBatchNorm,
    stem=frozen_stem,
)
# For training from scratch on small scenes: group norm needs no batch and no pretraining.
ResNetSmall = partial(ResNet, block=BasicBlock, depths=(1, 1, 1, 1), stem_size=3, norm=GroupNorm)
