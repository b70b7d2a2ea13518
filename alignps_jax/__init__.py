"""Anchor-free person search (AlignPS, CVPR 2021) in JAX and Flax."""

from typing import Any

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    # Late, because the data pipeline imports `alignps_jax.types` and the detector the pipeline.
    if name == "Detector":
        from alignps_jax.inference.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
