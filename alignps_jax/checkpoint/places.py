"""Which folders are checkpoints, which one of a run counts, and where its results may stay.

`path` is a run's workdir, its `checkpoints` folder, or the folder of one step, as everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.arrays import read_manifest, reading
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.types import UserError

CHECKPOINTS = "checkpoints"
SCORE = Path("metrics", "metrics")  # where Orbax has it in a step's folder
CALIBRATION = "calibration.json"  # there, too: how likely similarities mean the same person


def steps_in(root: Path) -> list[int]:
    """The steps whose folders lie in `root`, in no order; none if it is no folder."""
    entries = root.iterdir() if root.is_dir() else ()
    return [int(entry.name) for entry in entries if entry.name.isdigit() and entry.is_dir()]


def is_step(path: Path) -> bool:
    """Whether `path` is the folder of one step."""
    return (path / "manifest" / "metadata").is_file()


def holds_checkpoint(path: Path) -> bool:
    """Whether `path` leads to a checkpoint."""
    return is_step(path) or bool(steps_in(path / CHECKPOINTS) or steps_in(path))


def results_folder(path: Path) -> Path:
    """Where results of a checkpoint go when nobody says where.

    That is the workdir; for the folder of one step `<workdir>/step_<step>`, because training
    deletes folders of steps, and because results of several steps must not mix.
    """
    folder = path.absolute()
    if not is_step(folder):
        return path.parent if folder.name == CHECKPOINTS and steps_in(folder) else path
    if folder.parent.name != CHECKPOINTS:  # a copy
        return folder.with_name(f"{folder.name}_results")
    return folder.parent.parent / f"step_{folder.name}"


def last_step(path: Path) -> Path:
    """The folder of the newest step of a run; the folder of a step stands for itself.

    Raises UserError if there is no checkpoint.
    """
    path = Path(path).absolute()
    if is_step(path):
        return path
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not (steps := steps_in(root)):
        raise UserError(f"{path}: found no checkpoint, expected a run's workdir or part of it")
    return root / str(max(steps))


def chosen_step(path: Path, config: ConfigDict | None = None) -> tuple[Path, str]:
    """The step that results are reported of and that networks are loaded from; what chose it.

    The folder of a step stands for itself. Of a run it is the last step; with a validation split,
    the one with the highest search mAP on it; with `eval.choose_on_test`, on the test split.
    `config` says so; None: that of the last step. Raises UserError if there is no checkpoint.
    """
    last = last_step(path)
    if last == Path(path).absolute():
        return last, "hand"
    fields = config.to_dict() if config else read_manifest(last)["config"]
    split = "test" if fields["eval"]["choose_on_test"] else None
    split = "validation" if fields["data"]["validation_fraction"] else split
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
