"""Modules that keep nothing for the backward pass but their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Call = Callable[..., jax.Array]


def recomputed(module: type[nn.Module]) -> type[nn.Module]:
    """`module` with the same parameters, whose inside is computed again in the backward pass.

    For modules that map one array, and what needs no gradient, to one array. Unlike
    `flax.linen.remat` it also saves memory on a CPU, where XLA merges the second computation with
    the first one, drops the barriers that are to keep it from doing so, and works on several
    modules at once. A branch that only the incoming gradient decides on stays closed to it.
    """

    base: Any = module

    class Recomputed(base):
        def __call__(self, *inputs: Any) -> jax.Array:
            if self.is_initializing():
                return super().__call__(*inputs)
            own = {
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(module)
                if field.init and field.name not in ("parent", "name")
            }
            apply = module(**own, parent=None).apply
            params, others = self.variables["params"], dict(self.variables)

            def call(params: Any, others: Any, *inputs: Any) -> jax.Array:
                output: Any = apply({**others, "params": params}, *inputs)
                return output

            return _computed_twice(call)(params, others, *inputs)

    return Recomputed


def _computed_twice(call: Call) -> Call:
    """`call` of (params, others, x, ...), differentiable in `params` and `x` only."""

    def forward(*arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        return call(*arguments), arguments

    def backward(arguments: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
        params, others, x, *rest = arguments

        def again() -> tuple[Any, jax.Array]:
            return jax.vjp(lambda params, x: call(params, others, x, *rest), params, x)[1](d_out)

        def useless() -> tuple[Any, jax.Array]:
            return jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), (params, x))

        d_params, d_x = lax.cond(jnp.isfinite(d_out.ravel()[0]), again, useless)
        return d_params, None, d_x, *(None for _ in rest)

    twice = jax.custom_vjp(lambda *arguments: call(*arguments))
    twice.defvjp(forward, backward)
    return twice
