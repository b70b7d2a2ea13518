"""The RoI branch of ROI-AlignPS: proposals to train it with, and a second look at every box.

Both read C4 (stride 16); the second look has a last stage of the backbone of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from alignps_jax.arrays import l2_normalize
from alignps_jax.nn.convolution import Map
from alignps_jax.nn.layers import EPSILON, ValidSize, conv, mask_padding
from alignps_jax.nn.roi_align import roi_align
from alignps_jax.types import RoiOutputs, RpnOutputs

ANCHORS = 15  # at every location of C4
KEPT = 0.9  # share of the old running statistics in the new ones

Initializer = nn.initializers.Initializer
normal = nn.initializers.normal
zeros, ones = nn.initializers.zeros, nn.initializers.ones
Vectors = Float[Array, "N D"]
AddUp = Callable[[Array], Array]  # gives the sum over the devices


class RPNHead(nn.Module):
    """A logit and box deltas of every anchor, in the order of `RpnOutputs`."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, c4: Map, valid_size: ValidSize) -> RpnOutputs:
        make = partial(conv, use_bias=True, kernel_init=normal(0.01))
        x = nn.relu(make(c4.shape[-1], 3, dtype=self.dtype, name="conv")(c4))
        x = mask_padding(x, valid_size)
        logits = make(ANCHORS, 1, dtype=jnp.float32, name="cls")(x)
        deltas = make(4 * ANCHORS, 1, dtype=jnp.float32, name="reg")(x)
        return RpnOutputs(logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4))


class BatchNorm(nn.Module):
    """Batch normalization of vectors, by the statistics of the valid ones on all devices.

    Running statistics are in the collection `frozen`, which training updates if it is mutable.
    """

    scale_init: Initializer = ones

    @nn.compact
    def __call__(
        self, x: Vectors, valid: Bool[Array, "N"], *, train: bool, add_up: AddUp
    ) -> Vectors:
        shape = x.shape[-1:], jnp.float32
        scale, bias = (
            self.param("scale", self.scale_init, *shape),
            self.param("bias", zeros, *shape),
        )
        running_mean = self.variable("frozen", "mean", zeros, None, *shape)
        running_var = self.variable("frozen", "var", ones, None, *shape)
        mean, var = running_mean.value, running_var.value
        if train:
            count = add_up(jnp.sum(valid, dtype=jnp.float32))

            def average(values: Vectors) -> Float[Array, "D"]:
                return add_up(jnp.sum(values, 0, where=valid[:, None])) / jnp.maximum(count, 1)

            mean = average(x)
            var = average(jnp.square(x - mean))
            if self.is_mutable_collection("frozen") and not self.is_initializing():
                new = (1 - KEPT) * (count > 0)
                unbiased = var * count / jnp.maximum(count - 1, 1)
                running_mean.value += new * (mean - running_mean.value)
                running_var.value += new * (unbiased - running_var.value)
        return (x - mean) * lax.rsqrt(var + EPSILON) * scale + bias


class RoIHead(nn.Module):
    """Logits, box deltas and embeddings of boxes, in float32.

    Attributes:
      stage: the last stage of a backbone, called with (map, valid_size) in this module.
      features: length of embeddings; half of it comes from before the stage, half from after it.
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
        *,
        train: bool = False,
        add_up: AddUp = lambda x: x,
    ) -> RoiOutputs:
        """Predicts for boxes in pixels; statistics are those of `valid` ones (see `BatchNorm`)."""
        regions = lax.map(lambda one: roi_align(*one), (c4, boxes, valid_size))
        regions = regions.reshape(-1, *regions.shape[2:])
        sides = jnp.full((len(regions), 2), regions.shape[1], jnp.int32)
        before, after = max_pool(regions), max_pool(self.stage(regions, sides)[0])

        def norm(x: Vectors, name: str, init: Initializer = ones) -> Vectors:
            return BatchNorm(init, name=name)(x, valid.ravel(), train=train, add_up=add_up)

        def linear(x: Vectors, features: int, name: str, init: Initializer) -> Array:
            return norm(nn.Dense(features, kernel_init=init, name=name)(x), f"{name}_bn", init)

        pooled = enumerate((before, after))
        parts = [linear(x, self.features // 2, f"projector{i}", normal(0.01)) for i, x in pooled]
        projected = jnp.concatenate(parts, axis=-1)
        embeddings = l2_normalize(projected)
        logits = norm(jnp.sum(embeddings * projected, axis=-1, keepdims=True), "rescaler")
        deltas = linear(after, 4, "fc_reg", normal(0.001))
        # Nothing reads it, but it is in the published files.
        dead = {"kernel": jnp.zeros((after.shape[-1], 2)), "bias": jnp.zeros(2)}
        self.variable("frozen", "fc_cls", lambda: dead)
        outputs = logits[:, 0], deltas, embeddings
        return RoiOutputs(*(x.reshape(*valid.shape, *x.shape[1:]) for x in outputs))


@jax.custom_jvp
def max_pool(x: Map) -> Float[Array, "B C"]:
    """The maximum of each channel in float32; the first of equal ones gets the gradient."""
    return x.max((1, 2)).astype(jnp.float32)


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Map], tangents: tuple[Map]) -> tuple[Array, Array]:
    x, d_x = (a.reshape(len(a), -1, a.shape[-1]) for a in primals + tangents)
    first = jnp.arange(x.shape[1])[:, None] == jnp.argmax(x, axis=1)[:, None]
    return max_pool(*primals), jnp.sum(d_x, axis=1, where=first, dtype=jnp.float32)


class MutualInformation(nn.Module):
    """The function T of two vectors whose means bound their mutual information."""

    @nn.compact
    def __call__(self, u: Float[Array, "K D"], v: Float[Array, "K D"]) -> Float[Array, "K"]:
        x = _linear(jnp.concatenate([u, v], axis=-1), u.shape[-1], "hidden")
        return _linear(nn.relu(x), 1, "output")[:, 0]


def _linear(x: Vectors, features: int, name: str) -> Float[Array, "N F"]:
    """A linear layer with the initial values of PyTorch."""
    bound = x.shape[-1] ** -0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)
