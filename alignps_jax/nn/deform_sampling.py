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
from jaxtyping import Array, Float, Int

from alignps_jax.nn import deform_gathers, deform_outside
from alignps_jax.nn.deform_blocks import MapSize, chunk_of
from alignps_jax.nn.deform_gathers import Order, Rows, Weights

_ALL_PLATFORMS = contextvars.ContextVar("for_all_platforms", default=False)


def corners(
    y: Float[Array, "B h w K"], x: Float[Array, "B h w K"], size: tuple[int, int]
) -> tuple[list[Int[Array, "M K"]], list[Float[Array, "M K"]]]:
    """Rows of the table [B*H*W, C] that hold the four pixels around each position, and weights.

    The weights are bilinear, 0 for pixels outside the image, NaN where a coordinate is.
    """
    image = np.arange(len(y), dtype=np.int32)[:, None, None, None] * size[0]
    found = [
        ((image + row) * size[1] + column, row_weight * column_weight)
        for row, row_weight in _neighbors(y, size[0])
        for column, column_weight in _neighbors(x, size[1])
    ]
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)
    return [row for row, _ in flat], [weight for _, weight in flat]


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
    table: Float[Array, "R C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
) -> Float[Array, "M F"]:
    """Sum over the taps of sample(map) @ kernel; M are the locations of the output.

    Args:
      order: how, or how on each platform.
      table: the map's pixels, row by row.
      weights: of the four corners of every sample.
      kernel: of every tap.
      rows: of the table, where the corners are.
    """
    args = table, weights, kernel.astype(table.dtype), rows
    return _run(order, _forward, *args).astype(table.dtype)


def _sample_and_multiply_fwd(order: Any, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    return sample_and_multiply(order, *args), args


def _sample_and_multiply_bwd(
    order: Any, residuals: tuple[Any, ...], d_out: Float[Array, "M F"]
) -> tuple[Any, ...]:
    """Cotangents of table, weights and kernel."""
    table, weights, kernel, rows = residuals
    args = table, weights, kernel.astype(table.dtype), rows, d_out
    d_table, d_weights, d_kernel = _run(order, _backward, *args)
    return d_table.astype(table.dtype), d_weights, d_kernel.astype(kernel.dtype), None


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


def _forward(order: Order | Windows, *args: Any) -> Array:
    if isinstance(order, Windows):
        return deform_outside.forward(order.size, *args, interpret=order.interpret)
    return deform_gathers.forward(order, *args)


def _backward(order: Order | Windows, *args: Any) -> tuple[Any, ...]:
    if isinstance(order, Windows):
        return deform_outside.backward(order.size, *args, interpret=order.interpret)
    return deform_gathers.backward(order, *args)
