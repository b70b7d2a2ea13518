"""The readers of small files that runs, processes and tables leave, that are fuzzed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignps_jax.figures.datasets import gallery_sizes
from data_pipeline.leftovers import clear_leftovers, sign
from tests.fuzz.mutations import damage, damage_json
from tests.fuzz.runner import Reader

_METRICS, _DATA = "metrics.json", "data"


def _results(folder: Path) -> Sequence[Path]:
    metrics = {
        "dataset": "cuhk_sysu",
        "detection": {"recall": 0.75, "AP": 0.5},
        "search": {
            name: {"mAP": 0.5, "top1": 0.625, "top5": 0.75} for name in ("TestG50", "TestG100")
        },
    }
    (folder / _METRICS).write_text(json.dumps(metrics))
    unfinished = folder / _DATA / "tiny" / "incomplete.x_1.0.0"
    unfinished.mkdir(parents=True)
    sign(unfinished)
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return sorted(paths)


def _read_result(folder: Path, path: Path) -> Any:
    """What is read of the file that was damaged."""
    if path.is_relative_to(folder / _DATA):
        return _cleared(folder)
    return gallery_sizes([path]).maps


def _cleared(folder: Path) -> list[str]:
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / _DATA, copy)
    return list(clear_leftovers(copy))


def _check_result(found: Any) -> None:
    if isinstance(found, dict):
        values = [value for one in found.values() for value in one.values()]
        assert all(type(x) is float and 0 <= x <= 1 for x in values), "a mAP that is none"


def damage_result(rng: random.Random, data: bytes) -> bytes:
    return (damage_json if rng.random() < 0.8 else damage)(rng, data)


RESULT_READERS: dict[str, Reader] = {
    "results": Reader(
        build=_results,
        read=_read_result,
        check=_check_result,
        damage=damage_result,
    ),
}
