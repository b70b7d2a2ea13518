"""Compiled programs on disk."""

from __future__ import annotations

from pathlib import Path

import jax


def use_compilation_cache(workdir: Path, checkpoint: Path | None = None) -> None:
    """Keeps compiled programs in `<workdir>/xla_cache`, so that the next start is quick.

    The small ones too: a start compiles hundreds of them, initialisers above all. Where a whole
    run is the `checkpoint` that is used, its own cache serves all that is done with it.
    """
    if checkpoint is not None and (checkpoint / "checkpoints").is_dir():
        workdir = checkpoint
    jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "xla_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
