"""Functions that are computed in another way on each platform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

_EVERY = ContextVar("for_every_platform", default=False)


def on_platform(*args: Any, default: Callable[..., Any], **ways: Callable[..., Any]) -> Any:
    """Calls the way of this machine's platform ("cpu", "cuda", "tpu"), or `default`.

    `lax.platform_dependent` chooses when a program is compiled, but two thirds of the time to trace
    a network go into the ways of other platforms. Every way runs on every platform.
    """
    if not _EVERY.get():
        return ways.get(jax.default_backend().replace("gpu", "cuda"), default)(*args)
    return lax.platform_dependent(*args, default=default, **ways)


@contextmanager
def for_every_platform() -> Iterator[None]:
    """What is traced meanwhile has the ways of all platforms, for other machines than this one."""
    token = _EVERY.set(True)
    try:
        yield
    finally:
        _EVERY.reset(token)
