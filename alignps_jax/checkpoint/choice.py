"""Which checkpoint of a run is meant, also where several processes have to mean the same."""

from __future__ import annotations

import time
from pathlib import Path

from alignps_jax.checkpoint.places import is_step, steps_in
from alignps_jax.checkpoint.scores import best_step
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.types import UserError

# Seconds after which every machine sees what another one wrote, or never will.
_LATE = 60


def find_step(path: Path, which: str | int) -> Path:
    """The folder of one checkpoint; see `load_weights` of `store.py`."""
    path = Path(path).absolute()
    if is_step(path):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(steps_in(root))
    if not steps:
        raise UserError(f"{path}: found no checkpoint, expected a run's workdir or part of it")
    if which in ("best", "latest"):
        best = best_step(root) if which == "best" else None
        which = steps[-1] if best is None else best
    if which not in steps:
        raise UserError(f"{root}: found steps {steps}, expected best, latest or one of them")
    return root / str(which)


def best_step_of(path: Path) -> int:
    """The step that `load_weights` takes of `path`; all processes agree on it."""
    own = int(find_step(path, "best").name) if is_main_process() else 0
    step = int(broadcast_from_main(own))
    root = Path(path) / "checkpoints"
    if root.is_dir():
        await_folder(root / str(step))
    return step


def await_folder(folder: Path) -> None:
    """Waits for what process 0 sees: a network file system may show it here later."""
    end = time.monotonic() + _LATE
    while not is_main_process() and not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.1)
