"""Deformable convolutions by windows (`deform_windows.py`), and by gathers what lies outside them.

The kernels leave out corners that are not in the window of their location. A location with such
corners is taken once more, with those corners only, by gathers and scatters; some locations at a
time, until none is left. So a few far offsets cost little, and the time grows with their number.

The corners of all taps are one array: on a TPU each array takes the room of 128 columns, and time
to compile. Maps keep their four dimensions up to the gathers: on a TPU a map is laid out in another
way than a table of its pixels, and what a branch takes must be there, even if it is not taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from alignps_jax.nn import deform_windows
from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_blocks import MapSize, beside, ends, inside_windows
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Rows, Weights, scatter

# How many locations at a time.
SOME = 128


@dataclasses.dataclass(frozen=True)
class _Outside:
    """L locations, and the corners outside the windows of their S samples, of K taps each.

    Attributes:
      at: the locations; those after the last one with corners outside are beyond the map.
      outside: which of their corners are outside.
      weights: of all four corners, 0 where they are inside.
      rows: of all four corners.
    """

    at: Int[Array, "L"]
    outside: Bool[Array, "4 S"]
    weights: Float[Array, "4 S"]
    rows: Int[Array, "4 S"]

    def read(self, table: Float[Array, "M C"]) -> tuple[Array, Array]:
        """The corners [4, S, C], and the samples [L, K * C] in the type of `table`."""
        corners = table.at[self.rows.ravel()].get(**IN_BOUNDS).reshape(*self.rows.shape, -1)
        samples = (self.weights[..., None] * corners).sum(axis=0).astype(table.dtype)
        return corners, samples.reshape(len(self.at), -1)


def _take(x: Num[Array, "M N"], at: Int[Array, "L"]) -> Num[Array, "L N"]:
    """Rows of `x`, zeros beyond the last."""
    return x.at[at].get(mode="fill", fill_value=0)


def _by_corner(x: Shaped[Array, "L N"]) -> Shaped[Array, "4 S"]:
    return x.reshape(len(x), 4, -1).swapaxes(0, 1).reshape(4, -1)


def _by_location(x: Num[Array, "4 S"]) -> Num[Array, "L N"]:
    return x.reshape(4, SOME, -1).swapaxes(0, 1).reshape(SOME, -1)


def _add_outside(
    size: MapSize,
    weights: Float[Array, "M N"],
    rows: Int[Array, "M N"],
    add: Callable[[_Outside, Any], Any],
    sums: Any,
) -> Any:
    """The sums after `add` has taken all locations with corners outside their windows."""
    inside = inside_windows(size, ends(rows)).all(axis=1)
    count = len(inside) - inside.sum(dtype=jnp.int32)

    def add_all(sums: Any) -> Any:
        # The n-th location with corners outside comes after those where fewer have been met.
        met = jnp.cumsum(~inside, dtype=jnp.int32)

        def add_some(turn: Any, sums: Any) -> Any:
            wanted = turn * SOME + jnp.arange(SOME, dtype=jnp.int32)
            at = (met <= wanted[:, None]).sum(axis=1, dtype=jnp.int32)
            some_rows = _take(rows, at)
            outside = ~inside_windows(size, some_rows, at[:, None])
            some_weights = jnp.where(outside, _take(weights, at), 0.0)
            some = map(_by_corner, (outside, some_weights, some_rows))
            return add(_Outside(at, *some), sums)

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
    packed_weights, packed_rows = beside(weights), beside(rows)
    maps, features = table.reshape(*size, -1), kernel.shape[-1]

    def add(some: _Outside, out: Array) -> Array:
        _, samples = some.read(maps.reshape(table.shape))
        more = matmul(samples, kernel.reshape(-1, features))
        return out.reshape(-1, features).at[some.at].add(more, mode="drop").reshape(out.shape)

    out = deform_windows.forward(
        size, table, packed_weights, kernel, packed_rows, interpret=interpret
    )
    out = _add_outside(size, packed_weights, packed_rows, add, out.reshape(*size, -1))
    return out.reshape(-1, features)


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
    packed_weights, packed_rows = beside(weights), beside(rows)
    maps, d_maps = table.reshape(*size, -1), d_out.reshape(*size, -1)
    channels, features = kernel.shape[1:]

    def add(some: _Outside, sums: Any) -> Any:
        d_input, d_weights, d_kernel = sums
        corners, samples = some.read(maps.reshape(table.shape))
        d_some = _take(d_maps.reshape(d_out.shape), some.at)
        d_kernel += matmul(samples.T, d_some).reshape(kernel.shape)
        d_samples = matmul(d_some, kernel.reshape(-1, features).T).reshape(-1, channels)
        more = jnp.where(some.outside, (corners * d_samples).sum(axis=-1), 0.0)
        d_weights = d_weights.at[some.at].add(_by_location(more), mode="drop")
        flat = d_input.reshape(table.shape)
        flat = scatter(flat, some.rows, some.weights, d_samples, at_once=False)
        return flat.reshape(d_input.shape), d_weights, d_kernel

    d_table, *others = deform_windows.backward(
        size, table, packed_weights, kernel, packed_rows, d_out, interpret=interpret
    )
    sums = d_table.reshape(maps.shape), *others
    d_table, d_weights, d_kernel = _add_outside(size, packed_weights, packed_rows, add, sums)
    return d_table.reshape(table.shape), tuple(jnp.split(d_weights, 4, axis=1)), d_kernel
