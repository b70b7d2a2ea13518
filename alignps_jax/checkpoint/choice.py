"""Which checkpoint of a run counts, also where several processes have to mean the same."""

from __future__ import annotations

import time
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.arrays import read_manifest
from alignps_jax.checkpoint.places import is_step, steps_in
from alignps_jax.checkpoint.scores import best_step
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.types import UserError

# Seconds after which every machine sees what another one wrote, or never will.
_LATE = 60


def chosen_step(path: Path, config: ConfigDict | None = None) -> tuple[Path, str]:
    """The step that results are reported of and that networks are loaded from; what chose it.

    The folder of a step stands for itself. Of a run it is the last step; with a validation split,
    the one with the highest search mAP on it; with `eval.choose_on_test`, on the test split.

    Args:
      path: a workdir, its `checkpoints` folder, or the folder of one step.
      config: says how to choose; None: that of the last step.

    Raises:
      UserError: there is no checkpoint.
    """
    if is_step(Path(path).absolute()):
        return Path(path).absolute(), "hand"
    last = find_step(path, "latest")
    fields = config.to_dict() if config else read_manifest(last, lambda about: about["config"])
    split = "test" if fields.get("eval", {}).get("choose_on_test") else None
    split = "validation" if fields.get("data", {}).get("validation_fraction") else split
    best = best_step(last.parent) if split else None
    if best is None:
        return last, "being the last"
    return last.with_name(str(best)), f"search mAP on the {split} split"


def find_step(path: Path, which: str | int = "chosen", config: ConfigDict | None = None) -> Path:
    """The folder of one checkpoint: the "chosen" one (`chosen_step`), the "latest", or a step."""
    path = Path(path).absolute()
    if which == "chosen":
        return chosen_step(path, config)[0]
    if is_step(path):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(steps_in(root))
    if not steps:
        raise UserError(f"{path}: found no checkpoint, expected a run's workdir or part of it")
    which = steps[-1] if which == "latest" else which
    if which not in steps:
        raise UserError(f"{root}: found steps {steps}, expected chosen, latest or one of them")
    return root / str(which)


def agreed_step(path: Path, config: ConfigDict) -> tuple[Path, str]:
    """`chosen_step`, the same in all processes."""
    own = [str(part) for part in chosen_step(path, config)] if is_main_process() else None
    folder, by = broadcast_from_main(own)
    await_folder(Path(folder))
    return Path(folder), by


def await_folder(folder: Path) -> None:
    """Waits for what process 0 sees: a network file system may show it here later."""
    end = time.monotonic() + _LATE
    while not is_main_process() and not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.1)
