"""What a finished run left, for comparison with another one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CLOCK = ("images_per_second", "data_wait")


def results(workdir: Path) -> dict[str, object]:
    """By name, all that must not depend on how often a run was interrupted."""
    checkpoints = workdir / "checkpoints"
    found: dict[str, object] = {"log": log_lines(workdir)}
    for name in ("metrics.json", "queries.csv"):
        found[name] = (workdir / name).read_text()
    with np.load(workdir / "detections.npz") as saved:
        found["detections"] = {name: saved[name].tobytes() for name in saved.files}
    for folder in sorted(checkpoints.iterdir()):
        manifest = json.loads((folder / "manifest" / "metadata").read_text())
        found[f"arrays of step {folder.name}"] = manifest["arrays"]
        score = folder / "metrics" / "metrics"
        found[f"score of step {folder.name}"] = score.read_text() if score.exists() else None
    leftovers = [path.name for path in workdir.iterdir() if path.name.endswith(".tmp")]
    found["left over"] = leftovers
    return found


def log_lines(workdir: Path) -> list[dict[str, object]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in CLOCK} for line in lines]


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The names of what differs."""
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if found.get(name) != expected.get(name)]
