"""The scores of a run's checkpoints, which pick the best one."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path

from alignps_jax.checkpoint.arrays import read_json, reading, unsealed
from alignps_jax.checkpoint.places import steps_in
from alignps_jax.files import write_json


def best_step(root: Path) -> int | None:
    """The step with the highest score, the newest of several; None if none has one."""
    folders = {step: root / str(step) for step in steps_in(root)}
    scores = {
        step: reading(folder, partial(_score_in, folder))
        for step, folder in folders.items()
        if (folder / "metrics").is_dir()
    }
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _read_metrics(folder: Path) -> dict[str, float]:
    file = folder / "metrics" / "metrics"  # where Orbax has them
    return unsealed(read_json(file), ("score",))


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Adds metrics to a checkpoint, at once: a metrics folder without its file is damage."""
    new = folder / "metrics.new"
    write_json(new / "metrics", metrics)
    if (folder / "metrics").is_dir():
        os.replace(new / "metrics", folder / "metrics" / "metrics")
    else:
        new.rename(folder / "metrics")


def _score_in(folder: Path) -> float:
    return score_in(_read_metrics(folder))


def score_in(metrics: dict[str, float]) -> float:
    """The score; ValueError if it is none."""
    if type(metrics["score"]) is not float or not math.isfinite(metrics["score"]):
        raise ValueError("the score is no number")
    return metrics["score"]
