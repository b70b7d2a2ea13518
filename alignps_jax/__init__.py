"""Anchor-free person search (AlignPS, CVPR 2021) in JAX and Flax."""

from typing import Any

__all__ = ["Detector", "Gallery", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Late, because the data pipeline imports `alignps_jax.types` and the detector the pipeline.
    if name == "Detector":
        from alignps_jax.inference.detector import Detector

        return Detector
    if name == "Gallery":
        from alignps_jax.gallery.store import Gallery

        return Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
