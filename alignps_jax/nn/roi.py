"""The RoI branch of ROI-AlignPS: what it proposes, what it says of regions of C4 (stride 16)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.nn.convolution import Map
from alignps_jax.nn.layers import EPSILON, ValidSize, conv, mask_padding
from alignps_jax.types import RegionOutputs

Initializer = nn.initializers.Initializer
normal, zeros, ones = nn.initializers.normal, nn.initializers.zeros, nn.initializers.ones
Vectors = Float[Array, "N _D"]
AddUp = Callable[[Array], Array] | None  # the sum over the devices, in training only

SIZE = 14  # rows of cells, and columns
CHUNK = 16  # regions at a time: mixed rows of 1024 channels of a map of 100 columns take 90 MB


class RPNHead(nn.Module):
    """A logit and box deltas of each of the 15 anchors of every location of C4.

    Anchor a at column x and row y has the index (y * w + x) * 15 + a.
    """

    @nn.compact
    def __call__(self, c4: Map, valid_size: ValidSize) -> RegionOutputs:
        make = partial(conv, use_bias=True, kernel_init=normal(0.01))
        x = nn.relu(make(c4.shape[-1], 3, dtype=c4.dtype, name="conv")(c4))
        x = mask_padding(x, valid_size)
        logits = make(15, 1, dtype=jnp.float32, name="cls")(x)
        deltas = make(60, 1, dtype=jnp.float32, name="reg")(x)
        return RegionOutputs(logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4))


class BatchNorm(nn.Module):
    """Batch normalization of vectors, by the statistics of the valid ones on all devices.

    Training updates running statistics, in the collection `frozen`; else they are what counts.
    """

    scale_init: Initializer = ones

    @nn.compact
    def __call__(self, x: Vectors, valid: Bool[Array, "N"], add_up: AddUp) -> Vectors:
        shape = x.shape[-1:], jnp.float32
        scale = self.param("scale", self.scale_init, *shape)
        bias = self.param("bias", zeros, *shape)
        old_mean = self.variable("frozen", "mean", zeros, None, *shape)
        old_var = self.variable("frozen", "var", ones, None, *shape)
        mean, var = old_mean.value, old_var.value
        if add_up:
            count = add_up(jnp.sum(valid, dtype=jnp.float32))

            def average(values: Vectors) -> Float[Array, "D"]:
                return add_up(jnp.sum(values, 0, where=valid[:, None])) / jnp.maximum(count, 1)

            mean = average(x)
            var = average(jnp.square(x - mean))
            new = 0.1 * (count > 0)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            old_mean.value += new * (mean - old_mean.value)
            old_var.value += new * (unbiased - old_var.value)
        return (x - mean) * lax.rsqrt(var + EPSILON) * scale + bias


class RoIHead(nn.Module):
    """Logits, box deltas and embeddings of boxes, in float32.

    `stage` is the last one of a backbone: half of an embedding's `features` come from before it.
    """

    stage: Callable[[Map, ValidSize], tuple[Map, ValidSize]]
    features: int

    @nn.compact
    def __call__(
        self,
        c4: Map,
        valid_size: ValidSize,
        boxes: Float[Array, "B R 4"],
        valid: Bool[Array, "B R"],
        add_up: AddUp = None,
    ) -> RegionOutputs:
        """Predictions for boxes in pixels; statistics are those of the `valid` ones."""
        regions = lax.map(lambda one: roi_align(*one), (c4, boxes, valid_size))
        regions = regions.reshape(-1, *regions.shape[2:])
        sides = jnp.full((len(regions), 2), regions.shape[1], jnp.int32)
        before, after = max_pool(regions), max_pool(self.stage(regions, sides)[0])

        counted = valid.ravel(), add_up

        def linear(x: Vectors, features: int, name: str, init: Initializer) -> Vectors:
            x = nn.Dense(features, kernel_init=init, name=name)(x)
            return BatchNorm(init, name=f"{name}_bn")(x, *counted)

        project = partial(linear, features=self.features // 2, init=normal(0.01))
        parts = project(before, name="projector0"), project(after, name="projector1")
        projected = jnp.concatenate(parts, axis=-1)
        embeddings = l2_normalize(projected)
        length = jnp.sum(embeddings * projected, axis=-1, keepdims=True)
        logits = BatchNorm(name="rescaler")(length, *counted)
        deltas = linear(after, 4, "fc_reg", normal(0.001))
        # Nothing reads it, but it is in the published files.
        dead = {"kernel": jnp.zeros((after.shape[-1], 2)), "bias": jnp.zeros(2)}
        self.variable("frozen", "fc_cls", lambda: dead)
        outputs = logits[:, 0], deltas, embeddings
        return RegionOutputs(*(x.reshape(*valid.shape, *x.shape[1:]) for x in outputs))


def roi_align(
    c4: Float[Array, "H W C"], boxes: Float[Array, "R 4"], valid_size: Int[Array, "2"]
) -> Float[Array, "R 14 14 C"]:
    """RoIAlign: the mean of bilinear samples in each cell of a grid over every box.

    Equals `torchvision.ops.roi_align` with `aligned` and its own choice of sample numbers. Boxes
    (in pixels, anywhere) get no gradient; those without area give zeros. `valid_size` is the size
    of the image's map without its padding.
    """
    boxes = lax.stop_gradient(boxes.astype(jnp.float32)) / 16 - 0.5
    left, top, right, bottom = jnp.moveaxis(boxes, 1, 0)
    # Samples lie on a grid, too: one matrix mixes rows of the map, then another one columns.
    rows = _shares(top, bottom - top, valid_size[0], c4.shape[0])
    columns = _shares(left, right - left, valid_size[1], c4.shape[1])

    def means(shares: tuple[Array, Array]) -> Float[Array, "14 14 C"]:
        rows, columns = (x.astype(c4.dtype) for x in shares)
        # Of two matrices: the gradient of `tensordot` takes twice as long on CPUs.
        mixed = (rows @ c4.reshape(len(c4), -1)).reshape(SIZE, *c4.shape[1:])
        return jnp.broadcast_to(columns, (SIZE, *columns.shape)) @ mixed

    # Equal parts: XLA's Triton code finds no tiles for some numbers of rows (H100, float32).
    part = min(CHUNK, len(boxes))
    missing = ((0, -len(boxes) % part), (0, 0), (0, 0))
    shares = jnp.pad(rows, missing), jnp.pad(columns, missing)
    return lax.map(means, shares, batch_size=part)[: len(boxes)]


def _shares(
    start: Float[Array, "R"], length: Float[Array, "R"], valid: Int[Array, ""], side: int
) -> Float[Array, "R 14 {side}"]:
    """Shares of the map's rows (or columns) in those of cells, of boxes in locations of the map."""
    # Divided by `SIZE` where that matters. XLA would multiply by the inverse of a scalar instead,
    # and that rounds differently.
    cell = length / jnp.maximum(SIZE, -length)
    count = jnp.ceil(cell)
    # Accelerators divide with an error in the last place; these products are exact.
    count = count - (SIZE * (count - 1) >= length) + (SIZE * count < length)
    start, cell, count = (x[:, None] for x in (start, cell, count))
    # Not negative; `abs` keeps product and sum apart, which one instruction would round only once.
    starts = start + jnp.abs(jnp.arange(SIZE) * cell)

    def add_sample(index: Int[Array, ""], total: Array) -> Array:
        at = starts + (index + 0.5) * cell / count
        inside = (index < count) & (at >= -1) & (at <= valid)
        at = jnp.clip(at, 0, valid - 1)
        near = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(side)), 0)
        return total + jnp.where(inside[..., None], near, 0)

    most = count.max(initial=0).astype(jnp.int32)
    total = lax.fori_loop(0, most, add_sample, jnp.zeros((*starts.shape, side)))
    return total / jnp.maximum(count, 1)[..., None]


def max_pool(x: Map) -> Float[Array, "B C"]:
    """The maximum of each channel in float32; the first of equal ones gets the gradient."""
    return nn.max_pool(x, x.shape[1:3])[:, 0, 0].astype(jnp.float32)


class MutualInformation(nn.Module):
    """The function T of two vectors whose means bound their mutual information."""

    @nn.compact
    def __call__(self, u: Float[Array, "K D"], v: Float[Array, "K D"]) -> Float[Array, "K"]:
        def linear(x: Vectors, features: int, name: str) -> Vectors:
            bound = x.shape[-1] ** -0.5  # PyTorch's default
            init = partial(jax.random.uniform, minval=-bound, maxval=bound)
            return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)

        x = nn.relu(linear(jnp.concatenate([u, v], axis=-1), u.shape[-1], "hidden"))
        return linear(x, 1, "output")[:, 0]
