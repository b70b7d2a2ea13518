"""The RoI branch of ROI-AlignPS: proposals for its training, and a second look at every box.

C4 (stride 16) is what both read. The branch's own last stage of the backbone makes the embedding
that is put beside the dense one (Released code).
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
REGION = 14  # cells of RoIAlign in both directions
KEPT = 0.9  # share of the old running statistics in the new ones

Initializer = nn.initializers.Initializer
normal = nn.initializers.normal(0.01)
zeros, ones = nn.initializers.zeros, nn.initializers.ones
# Adds up over the devices what each of them passes.
AddUp = Callable[[Array], Array]


class RPNHead(nn.Module):
    """A logit and box deltas for all anchors, in the order of `RpnOutputs`."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, c4: Map, valid_size: ValidSize) -> RpnOutputs:
        make = partial(conv, use_bias=True, kernel_init=normal)
        x = nn.relu(make(c4.shape[-1], 3, dtype=self.dtype, name="conv")(c4))
        x = mask_padding(x, valid_size)
        logits = make(ANCHORS, 1, dtype=jnp.float32, name="cls")(x)
        deltas = make(4 * ANCHORS, 1, dtype=jnp.float32, name="reg")(x)
        return RpnOutputs(logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4))


class BatchNorm(nn.Module):
    """Batch normalization of vectors; mean and variance of the valid ones on all devices.

    The running statistics are variables of the collection `frozen`. Training updates them where
    that is mutable, and inference uses them.
    """

    scale_init: Initializer = ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "N D"], valid: Bool[Array, "N"], *, train: bool, add_up: AddUp
    ) -> Float[Array, "N D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", zeros, shape, jnp.float32)
        running_mean = self.variable("frozen", "mean", zeros, None, shape, jnp.float32)
        running_var = self.variable("frozen", "var", ones, None, shape, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            count = add_up(jnp.sum(valid, dtype=jnp.float32))

            def average(values: Float[Array, "N D"]) -> Float[Array, "D"]:
                total = add_up(jnp.sum(values, axis=0, where=valid[:, None]))
                return total / jnp.maximum(count, 1)

            mean = average(x)
            var = average(jnp.square(x - mean))
            if self.is_mutable_collection("frozen") and not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1)
                kept = jnp.where(count > 0, KEPT, 1.0)
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    running.value = kept * running.value + (1 - kept) * lax.stop_gradient(new)
        return (x - mean) * lax.rsqrt(var + EPSILON) * scale + bias


class RoIHead(nn.Module):
    """Logits, box deltas and embeddings of given boxes; predictions in float32.

    Attributes:
      stage: the last stage of a backbone, called with (map, valid_size) in this module.
      features: length of embeddings; half of it comes from before the stage, half from after it.
    """

    stage: Callable[[Map, ValidSize], tuple[Map, ValidSize]]
    features: int
    dtype: str = "float32"

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
        """Predicts for `boxes` in pixels; those that are not `valid` have no part in statistics.

        `valid_size` is that of `c4`, which is zero outside of it.
        """
        regions = lax.map(lambda one: roi_align(*one), (c4.astype(self.dtype), boxes, valid_size))
        regions = regions.reshape(-1, *regions.shape[2:])
        sides = jnp.full((len(regions), 2), REGION, jnp.int32)
        before, after = max_pool(regions), max_pool(self.stage(regions, sides)[0])

        def norm(x: Float[Array, "N C"], name: str, init: Initializer = ones) -> Array:
            return BatchNorm(init, name=name)(x, valid.ravel(), train=train, add_up=add_up)

        def linear(x: Float[Array, "N C"], features: int, name: str, init: Initializer) -> Array:
            return norm(nn.Dense(features, kernel_init=init, name=name)(x), f"{name}_bn", init)

        pooled = enumerate((before, after))
        parts = [linear(x, self.features // 2, f"projector{i}", normal) for i, x in pooled]
        projected = jnp.concatenate(parts, axis=-1)
        embeddings = l2_normalize(projected)
        logits = norm(jnp.sum(embeddings * projected, axis=-1, keepdims=True), "rescaler")
        deltas = linear(after, 4, "fc_reg", nn.initializers.normal(0.001))
        # Nothing reads it, but it is in the published files.
        dead = {"kernel": jnp.zeros((after.shape[-1], 2)), "bias": jnp.zeros(2)}
        self.variable("frozen", "fc_cls", lambda: dead)
        shape = valid.shape
        return RoiOutputs(
            logits.reshape(shape), deltas.reshape(*shape, 4), embeddings.reshape(*shape, -1)
        )


def max_pool(x: Map) -> Float[Array, "B C"]:
    """The maximum of each channel in float32; the first of equal ones gets the gradient."""
    x = x.reshape(len(x), -1, x.shape[-1])
    first = jnp.argmax(x, axis=1)[:, None]
    return jnp.sum(x, axis=1, where=jnp.arange(x.shape[1])[:, None] == first, dtype=jnp.float32)


class MutualInformation(nn.Module):
    """The function T whose mean over pairs of vectors bounds their mutual information."""

    @nn.compact
    def __call__(self, u: Float[Array, "K D"], v: Float[Array, "K D"]) -> Float[Array, "K"]:
        x = _linear(jnp.concatenate([u, v], axis=-1), u.shape[-1], "hidden")
        return _linear(nn.relu(x), 1, "output")[:, 0]


def _linear(x: Float[Array, "N C"], features: int, name: str) -> Float[Array, "N D"]:
    """A linear layer with the initial values of PyTorch."""
    bound = x.shape[-1] ** -0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)
