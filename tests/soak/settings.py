"""The environment of processes that a soak starts."""

from __future__ import annotations

import os


def compile_quickly() -> None:
    """Compiles quickly instead of well, as in all tests; runs share what they compile."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Else their folder is part of the keys of compiled programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quickly}"
