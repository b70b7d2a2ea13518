"""How exactly accelerators multiply float32 numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

# `exact` is float32 on every chip. `fast` is what JAX does unless told otherwise: one pass with
# operands in bfloat16 on TPUs, TensorFloat-32 on GPUs since Ampere; float32 on CPUs and older GPUs.
PRECISIONS = {"exact": "highest", "fast": "default"}


def products_in(precision: str) -> AbstractContextManager[None]:
    """While it lasts, products and convolutions are traced with an entry of `PRECISIONS`.

    Those that ask for a precision of their own keep it: the losses' similarities are always exact.
    Rules for gradients are traced with what holds where the gradient is taken.
    """
    return jax.default_matmul_precision(PRECISIONS[precision])
