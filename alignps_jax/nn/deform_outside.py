"""Deformable convolutions by windows (`deform_windows.py`), and by gathers what lies outside them.

The kernels leave out corners that are not in the window of their location. A location with such
corners is taken once more, with those corners only, by gathers and scatters; some locations at a
time, until none is left. So a few far offsets cost little, and the time grows with their number.

Maps keep their four dimensions up to there: on a TPU a map is laid out in another way than a table
of its pixels, and what a branch takes must be there, even if it is not taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    """Some locations, and their corners outside the windows.

    Attributes:
      at: the locations; those after the last one with corners outside are beyond the map.
      corners: which of their corners are outside.
      weights: of all four corners, 0 where they are inside.
      rows: of all four corners.
    """

    at: Int[Array, "L"]
    corners: list[Bool[Array, "L K"]]
    weights: Weights
    rows: Rows


def _take(x: Num[Array, "M N"], at: Int[Array, "L"]) -> Num[Array, "L N"]:
    """Rows of `x`, zeros beyond the last."""
    return x.at[at].get(mode="fill", fill_value=0)


def _add_outside(
    size: MapSize, weights: Weights, rows: Rows, add: Callable[[_Outside, Any], Any], sums: Any
) -> Any:
    """The sums after `add` has taken all locations with corners outside their windows."""
    locations = len(rows[0])
    # The second and third corner are in the rows and columns of the first and fourth.
    first, last = (inside_windows(size, rows[corner]) for corner in (0, 3))
    inside = (first & last).all(axis=1)
    count = locations - inside.sum(dtype=jnp.int32)

    def add_all(sums: Any) -> Any:
        # The n-th location with corners outside comes after those where fewer have been met.
        met = jnp.cumsum(~inside, dtype=jnp.int32)

        def add_some(turn: Any, sums: Any) -> Any:
            wanted = turn * SOME + jnp.arange(SOME, dtype=jnp.int32)
            at = (met <= wanted[:, None]).sum(axis=1, dtype=jnp.int32)
            some_rows = tuple(_take(row, at) for row in rows)
            corners = [~inside_windows(size, row, at[:, None]) for row in some_rows]
            some_weights = tuple(
                jnp.where(outside, _take(weight, at), 0.0)
                for outside, weight in zip(corners, weights, strict=True)
            )
            return add(_Outside(at, corners, some_weights, some_rows), sums)

        return lax.fori_loop(0, -(-count // SOME), add_some, sums)

    return lax.cond(count > 0, add_all, lambda sums: sums, sums)


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
    maps = table.reshape(*size, -1)

    def add(some: _Outside, out: Array) -> Array:
        table, (batch, height, width, features) = maps.reshape(len(rows[0]), -1), out.shape
        more = deform_gathers.forward(_BY_TILES, table, some.weights, kernel, some.rows)
        out = out.reshape(-1, features).at[some.at].add(more, mode="drop")
        return out.reshape(batch, height, width, features)

    out = deform_windows.forward(size, table, weights, kernel, rows, interpret=interpret)
    out = _add_outside(size, weights, rows, add, out.reshape(*size, -1))
    return out.reshape(-1, kernel.shape[-1])


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
    maps, d_maps = table.reshape(*size, -1), d_out.reshape(*size, -1)

    def add(some: _Outside, sums: Any) -> Any:
        d_table, d_weights, d_kernel = sums
        table, d_out = (x.reshape(len(rows[0]), -1) for x in (maps, d_maps))
        more_table, more_weights, more_kernel = deform_gathers.backward(
            _BY_TILES, table, some.weights, kernel, some.rows, _take(d_out, some.at)
        )
        d_weights = tuple(
            d.at[some.at].add(jnp.where(outside, more, 0.0), mode="drop")
            for d, outside, more in zip(d_weights, some.corners, more_weights, strict=True)
        )
        return d_table + more_table.reshape(d_table.shape), d_weights, d_kernel + more_kernel

    sums = deform_windows.backward(size, table, weights, kernel, rows, d_out, interpret=interpret)
    sums = sums[0].reshape(maps.shape), *sums[1:]
    d_table, d_weights, d_kernel = _add_outside(size, weights, rows, add, sums)
    return d_table.reshape(table.shape), d_weights, d_kernel
