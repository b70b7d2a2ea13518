"""Which folders are checkpoints, and where results of one may stay.

`path` is a run's workdir, its `checkpoints` folder, or the folder of one step, as everywhere.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"


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
