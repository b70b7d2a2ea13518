"""The RoI branch of ROI-AlignPS: what it proposes, what it says of regions of C4 (stride 16)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from alignps_jax.arrays import l2_normalize
from alignps_jax.nn.convolution import Map
from alignps_jax.nn.layers import EPSILON, ValidSize, conv, mask_padding
from alignps_jax.nn.roi_align import roi_align
from alignps_jax.types import RegionOutputs

Initializer = nn.initializers.Initializer
normal, zeros, ones = nn.initializers.normal, nn.initializers.zeros, nn.initializers.ones
Vectors = Float[Array, "N D"]
AddUp = Callable[[Array], Array] | None  # the sum over the devices, in training only


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

    `stage` is the last one of a backbone; half of the `features` of an embedding come from before
    it, half from after it.
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
