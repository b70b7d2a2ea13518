"""How a deformable convolution samples and multiplies, on each platform.

By gathers and scatters (`deform_gathers.py`), or, on TPUs, by products with windows of the map
and gathers of what lies outside them (`deform_outside.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from alignps_jax.nn import deform_gathers, deform_outside
from alignps_jax.nn.deform_blocks import MapSize, chunk_of
from alignps_jax.nn.deform_gathers import Order, Rows, Weights

_ALL_PLATFORMS = contextvars.ContextVar("for_all_platforms", default=False)


def corners(
    y: Float[Array, "B h w K"], x: Float[Array, "B h w K"], size: tuple[int, int]
) -> tuple[list[Int[Array, "B h w K"]], list[Float[Array, "B h w K"]]]:
    """Rows of the table [B*H*W, C] that hold the four pixels around each position, and weights.

    The weights are bilinear, 0 for pixels outside the image, NaN where a coordinate is.
    """
    image = jnp.arange(len(y), dtype=jnp.int32)[:, None, None, None] * size[0]
    found = [
        ((image + row) * size[1] + column, row_weight * column_weight)
        for row, row_weight in _neighbors(y, size[0])
        for column, column_weight in _neighbors(x, size[1])
    ]
    return [row for row, _ in found], [weight for _, weight in found]


def _neighbors(
    position: Float[Array, "B h w K"], size: int
) -> list[tuple[Int[Array, "B h w K"], Float[Array, "B h w K"]]]:
    """The pixel at or before and that after each position, along one axis, with linear weights.

    Instead of a pixel outside comes the nearest one inside, with weight 0.
    """
    # Far outside nothing changes any more; clipping keeps the conversion to integers sane.
    position = jnp.clip(position.astype(jnp.float32), -2.0, size + 1.0)
    first = jnp.floor(position)
    fraction = position - first
    return [
        (
            jnp.clip(pixel.astype(jnp.int32), 0, size - 1),
            jnp.where((pixel < 0) | (pixel >= size), 0.0, weight),
        )
        for pixel, weight in ((first, 1 - fraction), (first + 1, fraction))
    ]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Products with windows of the map, and gathers of what lies outside them.

    Attributes:
      size: of the map; the output has a location for each pixel.
      otherwise: the order where our own kernels cannot be (`for_all_platforms`).
      interpret: run the kernels step by step in JAX, as only tests do, to run them on a CPU.
    """

    size: MapSize
    otherwise: Order
    interpret: bool = False


@dataclasses.dataclass(frozen=True)
class Orders:
    """How each platform samples and multiplies."""

    cpu: Order
    gpu: Order
    tpu: Order | Windows


def orders(
    size: MapSize, locations: int, taps: int, channels: int, features: int, *, same: bool
) -> Orders:
    """The orders for each platform; the static shape decides.

    By taps no more rows may be multiplied, and far fewer channels must be sampled on CPUs: there a
    tile stays in the cache, and its inner products in 16 vector lanes. Elsewhere reading a row
    costs more than multiplying it, a tile's samples may be as large as the map, and 16 lanes would
    be padded to the 128 of a TPU.

    Args:
      size: of the map.
      locations: of the output, in all images.
      taps, channels, features: of the kernel.
      same: whether the output has a location for each pixel of the map.
    """
    large = -(-locations // taps)
    fits = np.prod(size) <= locations
    cpu = Order(bool(fits) and channels >= 4 * features, min(256, large), fenced=True, lanes=16)
    tpu = Order(bool(fits) and channels >= features, large)
    gpu = dataclasses.replace(tpu, group=_group(taps), at_once=True)
    windows = same and chunk_of(size, (taps, channels, features)) is not None
    return Orders(cpu, gpu, Windows(size, tpu) if windows else tpu)


def _group(taps: int) -> int:
    """How many taps a GPU works on at a time; they must divide all taps.

    Products of all nine are too wide for XLA's Triton code on an A100, which then does not compile.
    """
    return max(size for size in (1, 2, 3) if taps % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sample_and_multiply(
    order: Order | Windows | Orders,
    maps: Float[Array, "B H W C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "B h w F"]:
    """Sum over the taps of sample(map) @ kernel.

    Args:
      order: how, or how on each platform.
      maps: what is sampled.
      weights: of the four corners of every sample.
      kernel: of every tap.
      rows: where the corners are, in a table of all pixels, [B*H*W, C].
    """
    args = maps, weights, kernel.astype(maps.dtype), rows
    return _run(order, _forward, *args).astype(maps.dtype)


def _sample_and_multiply_fwd(order: Any, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    return sample_and_multiply(order, *args), args


def _sample_and_multiply_bwd(
    order: Any, residuals: tuple[Any, ...], d_out: Float[Array, "B h w F"]
) -> tuple[Any, ...]:
    """Cotangents of the map, weights and kernel."""
    maps, weights, kernel, rows = residuals
    args = maps, weights, kernel.astype(maps.dtype), rows, d_out
    d_maps, d_weights, d_kernel = _run(order, _backward, *args)
    return d_maps.astype(maps.dtype), d_weights, d_kernel.astype(kernel.dtype), None


sample_and_multiply.defvjp(_sample_and_multiply_fwd, _sample_and_multiply_bwd)


@contextlib.contextmanager
def for_all_platforms() -> Iterator[None]:
    """What is traced meanwhile has none of our own kernels, which lower for one platform only."""
    token = _ALL_PLATFORMS.set(True)
    try:
        yield
    finally:
        _ALL_PLATFORMS.reset(token)


def _run(order: Order | Windows | Orders, work: Callable[..., Any], *args: Any) -> Any:
    """Calls `work` with that order, or with the platform's."""
    if not isinstance(order, Orders):
        return work(order, *args)
    on_tpu = order.tpu
    if _ALL_PLATFORMS.get() and isinstance(on_tpu, Windows):
        on_tpu = on_tpu.otherwise
    cpu, gpu, tpu = (functools.partial(work, o) for o in (order.cpu, order.gpu, on_tpu))
    return lax.platform_dependent(*args, cpu=cpu, tpu=tpu, default=gpu)


def _forward(
    order: Order | Windows, maps: Array, weights: Weights, kernel: Array, rows: Rows
) -> Array:
    if isinstance(order, Windows):
        args = maps, weights, kernel, rows
        return deform_outside.forward(order.size, *args, interpret=order.interpret)
    table, flat_weights, flat_rows = jax.tree.map(_flat, (maps, weights, rows))
    out = deform_gathers.forward(order, table, flat_weights, kernel, flat_rows)
    return out.reshape(*rows[0].shape[:-1], -1)


def _backward(
    order: Order | Windows, maps: Array, weights: Weights, kernel: Array, rows: Rows, d_out: Array
) -> tuple[Any, ...]:
    if isinstance(order, Windows):
        args = maps, weights, kernel, rows, d_out
        return deform_outside.backward(order.size, *args, interpret=order.interpret)
    table, flat_weights, flat_rows, d_flat = jax.tree.map(_flat, (maps, weights, rows, d_out))
    d_table, d_weights, d_kernel = deform_gathers.backward(
        order, table, flat_weights, kernel, flat_rows, d_flat
    )
    d_weights = tuple(d.reshape(w.shape) for d, w in zip(d_weights, weights, strict=True))
    return d_table.reshape(maps.shape), d_weights, d_kernel


def _flat(x: Num[Array, "B h w N"]) -> Num[Array, "M N"]:
    return x.reshape(-1, x.shape[-1])
