"""Which checkpoint of a run counts, also where several processes have to mean the same."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.arrays import read_manifest, reading
from alignps_jax.checkpoint.places import is_step, steps_in
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.types import UserError

SCORE = Path("metrics", "metrics")  # where Orbax has it in a step's folder


def last_step(path: Path) -> Path:
    """The folder of the newest step of a run; the folder of a step stands for itself.

    Raises:
      UserError: there is no checkpoint.
    """
    path = Path(path).absolute()
    if is_step(path):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not (steps := steps_in(root)):
        raise UserError(f"{path}: found no checkpoint, expected a run's workdir or part of it")
    return root / str(max(steps))


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
    last = last_step(path)
    if last == Path(path).absolute():
        return last, "hand"
    fields = config.to_dict() if config else read_manifest(last)["config"]
    split = "test" if fields.get("eval", {}).get("choose_on_test") else None
    split = "validation" if fields.get("data", {}).get("validation_fraction") else split
    scores = {}
    for step in steps_in(last.parent) if split else ():
        folder = last.with_name(str(step))
        if (folder / SCORE).is_file():
            with reading(folder):
                scores[step] = json.loads((folder / SCORE).read_text())["score"]
    if not scores:
        return last, "being the last"
    best = max(scores, key=lambda step: (scores[step], step))
    return last.with_name(str(best)), f"search mAP on the {split} split"


def agreed_step(path: Path, config: ConfigDict) -> tuple[Path, str]:
    """`chosen_step`, the same in all processes."""
    own = [str(part) for part in chosen_step(path, config)] if is_main_process() else None
    folder, by = broadcast_from_main(own)
    return Path(folder), by
