"""Deformable convolutions by windows (`deform_windows.py`), and by gathers what lies outside them.

The kernels leave out corners that are not in the window of their location. A location with such
corners is taken once more, with those corners only, by gathers and scatters; some locations at a
time, until none is left. So a few far offsets cost little, and the time grows with their number.

The corners of all taps are one array: on a TPU each array takes room for its padding, and time to
compile. It and the maps keep their four dimensions up to the gathers: a TPU pads the last two
dimensions in its memory, so that a list of a map's pixels is laid out in another way than the map,
and what a branch takes must be there, even if it is not taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from alignps_jax.nn import deform_windows
from alignps_jax.nn.convolution import matmul
from alignps_jax.nn.deform_blocks import MapSize, ends, inside_windows
from alignps_jax.nn.deform_gathers import IN_BOUNDS, Rows, Weights, scatter

# How many locations at a time.
SOME = 128


@dataclasses.dataclass(frozen=True)
class _Places:
    """L locations of a map: image, row and column; beyond the map if there is no such location."""

    image: Int[Array, "L"]
    y: Int[Array, "L"]
    x: Int[Array, "L"]

    def take(self, maps: Num[Array, "B h w N"]) -> Num[Array, "L N"]:
        """What is at the locations, zeros beyond the map."""
        return maps.at[self.image, self.y, self.x].get(mode="fill", fill_value=0)

    def add(self, maps: Float[Array, "B h w N"], more: Float[Array, "L N"]) -> Array:
        """The map with `more` at the locations."""
        return maps.at[self.image, self.y, self.x].add(more, mode="drop")

    def take_few(self, maps: Num[Array, "B h w N"]) -> Num[Array, "L N"]:
        """`take` by whole lines, for few channels: a TPU keeps the columns of these together."""
        lines = maps.at[self.image, self.y].get(mode="fill", fill_value=0)
        return jnp.where(self._column(maps), lines, 0).sum(axis=1, dtype=maps.dtype)

    def add_few(self, maps: Float[Array, "B h w N"], more: Float[Array, "L N"]) -> Array:
        """`add` by whole lines."""
        lines = jnp.where(self._column(maps), more[:, None], 0.0)
        return maps.at[self.image, self.y].add(lines, mode="drop")

    def _column(self, maps: Num[Array, "B h w N"]) -> Bool[Array, "L w 1"]:
        return (jnp.arange(maps.shape[2]) == self.x[:, None])[..., None]


@dataclasses.dataclass(frozen=True)
class _Outside:
    """L locations, and the corners outside the windows of their S samples, of K taps each.

    Attributes:
      at: the locations.
      outside: which of their corners are outside.
      weights: of all four corners, 0 where they are inside.
      rows: of all four corners.
    """

    at: _Places
    outside: Bool[Array, "4 S"]
    weights: Float[Array, "4 S"]
    rows: Int[Array, "4 S"]

    def read(self, maps: Float[Array, "B H W C"]) -> tuple[Array, Array]:
        """The corners [4, S, C], and the samples [L, K * C] in the type of `maps`."""
        table = maps.reshape(-1, maps.shape[-1])
        corners = table.at[self.rows.ravel()].get(**IN_BOUNDS).reshape(*self.rows.shape, -1)
        samples = (self.weights[..., None] * corners).sum(axis=0).astype(table.dtype)
        return corners, samples.reshape(SOME, -1)


def _all_corners(arrays: tuple[Num[Array, "B h w K"], ...]) -> Num[Array, "B h w N"]:
    return jnp.concatenate(arrays, axis=-1)


def _by_corner(x: Shaped[Array, "L N"]) -> Shaped[Array, "4 S"]:
    return x.reshape(len(x), 4, -1).swapaxes(0, 1).reshape(4, -1)


def _by_location(x: Num[Array, "4 S"]) -> Num[Array, "L N"]:
    return x.reshape(4, SOME, -1).swapaxes(0, 1).reshape(SOME, -1)


def _some(outside: Bool[Array, "B h w"], met: Int[Array, "B*h"], turn: Int[Array, ""]) -> _Places:
    """The locations [turn * SOME, (turn + 1) * SOME) of those with corners outside.

    Args:
      outside: whether a location has any.
      met: how many locations have any, up to the end of each line of the map.
      turn: how often some were taken before.
    """
    wanted = turn * SOME + jnp.arange(SOME, dtype=jnp.int32)[:, None]
    # The n-th one comes after the lines with which fewer have been met, and so in its line.
    before = met <= wanted
    image, y = jnp.divmod(before.sum(axis=1, dtype=jnp.int32), outside.shape[1])
    in_line = wanted - jnp.where(before, met, 0).max(axis=1, keepdims=True)
    line = outside.at[image, y].get(mode="fill", fill_value=False)
    met_in_line = jnp.cumsum(line, axis=1, dtype=jnp.int32)
    return _Places(image, y, (met_in_line <= in_line).sum(axis=1, dtype=jnp.int32))


def _add_outside(
    size: MapSize,
    weights: Float[Array, "B h w N"],
    rows: Int[Array, "B h w N"],
    add: Callable[[_Outside, Any], Any],
    sums: Any,
) -> Any:
    """The sums after `add` has taken all locations with corners outside their windows."""
    any_outside = ~inside_windows(size, ends(rows)).all(axis=-1)
    in_lines = any_outside.sum(axis=2, dtype=jnp.int32).ravel()
    count = in_lines.sum()

    def add_some(met: Array, turn: Any, sums: Any) -> Any:
        at = _some(any_outside, met, turn)
        some_rows = at.take_few(rows)
        outside = ~inside_windows(size, some_rows, (at.image, at.y, at.x))
        some_weights = jnp.where(outside, at.take_few(weights), 0.0)
        some = map(_by_corner, (outside, some_weights, some_rows))
        return add(_Outside(at, *some), sums)

    def add_all(sums: Any) -> Any:
        met = jnp.cumsum(in_lines, dtype=jnp.int32)
        return lax.fori_loop(0, -(-count // SOME), partial(add_some, met), sums)

    return lax.cond(count > 0, add_all, lambda sums: sums, sums)


def forward(
    size: MapSize,
    maps: Float[Array, "B H W C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    *,
    interpret: bool = False,
) -> Float[Array, "B h w F"]:
    """`deform_sampling.sample_and_multiply`, in float32."""
    packed = _all_corners(weights), _all_corners(rows)

    def add(some: _Outside, out: Array) -> Array:
        _, samples = some.read(maps)
        return some.at.add(out, matmul(samples, kernel.reshape(-1, kernel.shape[-1])))

    out = deform_windows.forward(size, maps, *packed, kernel, interpret=interpret)
    return _add_outside(size, *packed, add, out)


def backward(
    size: MapSize,
    maps: Float[Array, "B H W C"],
    weights: Weights,
    kernel: Float[Array, "K C F"],
    rows: Rows,
    d_out: Float[Array, "B h w F"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H W C"], Weights, Float[Array, "K C F"]]:
    """Cotangents of the map, weights and kernel, in float32."""
    packed = _all_corners(weights), _all_corners(rows)
    channels, features = kernel.shape[1:]

    def add(some: _Outside, sums: Any) -> Any:
        d_maps, d_weights, d_kernel = sums
        corners, samples = some.read(maps)
        d_some = some.at.take(d_out)
        d_kernel += matmul(samples.T, d_some).reshape(kernel.shape)
        d_samples = matmul(d_some, kernel.reshape(-1, features).T).reshape(-1, channels)
        more = jnp.where(some.outside, (corners * d_samples).sum(axis=-1), 0.0)
        d_weights = some.at.add_few(d_weights, _by_location(more))
        d_table = d_maps.reshape(-1, channels)
        d_table = scatter(d_table, some.rows, some.weights, d_samples, at_once=False)
        return d_table.reshape(d_maps.shape), d_weights, d_kernel

    sums = deform_windows.backward(size, maps, *packed, kernel, d_out, interpret=interpret)
    d_maps, d_weights, d_kernel = _add_outside(size, *packed, add, sums)
    return d_maps, tuple(jnp.split(d_weights, 4, axis=-1)), d_kernel
