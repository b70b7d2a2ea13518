"""Deformable convolutions by windows (`deform_windows.py`), and by gathers what lies outside them.

The kernels leave out corners that are not in the window of their location. A location with such
corners is taken once more, with those corners only, by gathers and scatters; some locations at a
time, until none is left. So a few far offsets cost little, and the time grows with their number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from alignps_jax.nn import deform_gathers, deform_windows
from alignps_jax.nn.deform_blocks import MapSize, inside_windows
from alignps_jax.nn.deform_gathers import Order, Rows, Weights

# How many locations at a time.
SOME = 128
_BY_TILES = Order(by_taps=False, tile=SOME)


@dataclasses.dataclass(frozen=True)
class _Outside:
    """The locations with corners outside their windows: the first `count` of `order`."""

    size: MapSize
    weights: Weights
    rows: Rows
    order: Int[Array, "N"]
    count: Int[Array, ""]

    @property
    def turns(self) -> Int[Array, ""]:
        """After so many turns none is left."""
        return -(-self.count // SOME)

    def some(self, turn: Any) -> tuple[Int[Array, "L"], Bool[Array, "4 L K"], Any]:
        """Some locations, which of their corners are outside, and their weights and rows.

        There may be locations without corners outside. Those beyond the last have weights of 0.
        """
        at = lax.dynamic_slice_in_dim(self.order, turn * SOME, SOME)
        weights, rows = (
            [take(each, at) for each in corners] for corners in (self.weights, self.rows)
        )
        outside = [~inside_windows(self.size, row, at[:, None]) for row in rows]
        weights = [jnp.where(out, w, 0.0) for out, w in zip(outside, weights, strict=True)]
        return at, jnp.stack(outside), (tuple(weights), tuple(rows))


def take(x: Num[Array, "M N"], at: Int[Array, "L"]) -> Num[Array, "L N"]:
    """Rows of `x`, zeros beyond the last."""
    return x.at[at].get(mode="fill", fill_value=0)


def _find(size: MapSize, weights: Weights, rows: Rows) -> _Outside:
    locations = len(rows[0])
    everywhere = jnp.arange(locations, dtype=jnp.int32)
    # The second and third corner are in the rows and columns of the first and fourth.
    first, last = (inside_windows(size, rows[each], everywhere[:, None]) for each in (0, 3))
    inside = (first & last).all(axis=1)
    count = locations - inside.sum(dtype=jnp.int32)
    order = lax.cond(count > 0, jnp.argsort, lambda _: everywhere, inside)
    order = jnp.pad(order, (0, -locations % SOME), constant_values=locations)
    return _Outside(size, weights, rows, order, count)


def forward(
    size: MapSize,
    table: Float[Array, "M C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    *,
    interpret: bool = False,
) -> Float[Array, "M F"]:
    """`deform_sampling.sample_and_multiply`, in float32."""
    outside = _find(size, weights, rows)

    def add_some(turn: Any, out: Array) -> Array:
        at, _, (weights, rows) = outside.some(turn)
        more = deform_gathers.forward(_BY_TILES, table, weights, kernel, rows)
        return out.at[at].add(more, mode="drop")

    out = deform_windows.forward(size, table, weights, kernel, rows, interpret=interpret)
    return lax.fori_loop(0, outside.turns, add_some, out)


def backward(
    size: MapSize,
    table: Float[Array, "M C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "M F"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "M C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of table, weights and kernel, in float32."""
    outside = _find(size, weights, rows)

    def add_some(turn: Any, sums: Any) -> Any:
        d_table, d_weights, d_kernel = sums
        at, is_outside, (weights, rows) = outside.some(turn)
        more_table, more_weights, more_kernel = deform_gathers.backward(
            _BY_TILES, table, weights, kernel, rows, take(d_out, at)
        )
        d_weights = tuple(
            d.at[at].add(jnp.where(out, more, 0.0), mode="drop")
            for d, out, more in zip(d_weights, is_outside, more_weights, strict=True)
        )
        return d_table + more_table, d_weights, d_kernel + more_kernel

    args = table, weights, kernel, rows, d_out
    sums = deform_windows.backward(size, *args, interpret=interpret)
    return lax.fori_loop(0, outside.turns, add_some, sums)
