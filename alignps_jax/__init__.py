"""Anchor-free person search (AlignPS, CVPR 2021) in JAX and Flax."""

import importlib
from typing import Any

__version__ = "0.1.0"
_MODULES = {"Detector": "inference.detector", "Gallery": "gallery.gallery"}


def __getattr__(name: str) -> Any:
    # Late, because the data pipeline imports `alignps_jax.types` and the detector the pipeline.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
