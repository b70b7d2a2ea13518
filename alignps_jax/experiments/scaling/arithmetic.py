"""How much a step computes: its products and convolutions, counted in what JAX traced."""

from __future__ import annotations

import math
from typing import Any

import jax.extend.core as jex


def products(jaxpr: jex.Jaxpr) -> float:
    """Floating point operations of all products and convolutions, two for each multiplication.

    Loops (`lax.scan`, the grid of a Pallas kernel) count as often as they run, a `lax.while_loop`
    once. Of branches, among them those of other platforms, the one with the least that has any
    counts: what the method needs, however a platform does it. Under `shard_map` it is what one
    device does.
    """
    return sum(map(_of, jaxpr.eqns))


def _of(equation: jex.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sides = _shape(equation.invars[0])
        return (
            2.0
            * math.prod(_shape(equation.outvars[0]))
            * math.prod(sides[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [products(each) for each in jex.jaxprs_in_params(params)]
    if name == "cond":
        return min(filter(None, inner), default=0.0)
    return sum(inner) * _rounds(name, params)


def _rounds(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _convolution(equation: jex.JaxprEqn) -> float:
    kernel = _shape(equation.invars[1])
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # The zeros between the pixels of a dilated map are nothing to multiply.
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / features / zeros


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
