"""The readers of small files that runs, processes and tables leave, that are fuzzed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignps_jax.experiments.catalogue import PAPER_METRICS
from alignps_jax.experiments.reproduce import (
    ReproducedRow,
    refuse_other_settings,
    reproduced,
    run_folder,
)
from alignps_jax.experiments.scaling.gate import Row, run_gate
from alignps_jax.experiments.scaling.table import Table
from alignps_jax.figures.datasets import gallery_sizes
from configs import tiny
from configs.variants import rows_of
from data_pipeline.leftovers import clear_leftovers, sign
from tests.fuzz.mutations import damage, damage_json
from tests.fuzz.runner import Reader

_GATE, _METRICS, _DATA = "gate.json", "metrics.json", "data"


def _results(folder: Path) -> Sequence[Path]:
    metrics = {
        "dataset": "cuhk_sysu",
        "detection": {"recall": 0.75, "AP": 0.5},
        "search": {
            name: {"mAP": 0.5, "top1": 0.625, "top5": 0.75} for name in ("TestG50", "TestG100")
        },
    }
    run = run_folder(folder, "", 0)
    run.mkdir(parents=True)
    for place in (folder, run):
        (place / _METRICS).write_text(json.dumps(metrics))
    (run / "config.json").write_text(tiny.get_config().to_json())
    row = Row("h100:8", "train", (64, 48), 2, "float32", "highest", "a test")
    row = dataclasses.replace(row, estimates={"products": 0.5}, cycles={"copies": 7.0})
    with contextlib.redirect_stdout(None):
        Table(folder / _GATE, Row, {"step": lambda row: str(row.step)}).add(row)
    unfinished = folder / _DATA / "tiny" / "incomplete.x_1.0.0"
    unfinished.mkdir(parents=True)
    sign(unfinished)
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return sorted(paths)


def _read_result(folder: Path, path: Path) -> Any:
    """What is read of the file that was damaged."""
    if path.name == _GATE:
        with contextlib.redirect_stdout(None):
            run_gate(tiny.get_config(), (), (), path)
        return None
    if path.is_relative_to(folder / _DATA):
        return _cleared(folder)
    if path.name == "config.json":
        return refuse_other_settings(tiny.get_config(), path.parent)
    if path.parent == folder:
        return gallery_sizes([path]).maps
    _, row = next(iter(rows_of("6", "cuhk_sysu")))
    return reproduced(folder, "", row, (0,))


def _cleared(folder: Path) -> list[str]:
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / _DATA, copy)
    return list(clear_leftovers(copy))


def _check_result(found: Any) -> None:
    if isinstance(found, dict):
        values = [value for one in found.values() for value in one.values()]
        assert all(type(x) is float and 0 <= x <= 1 for x in values), "a mAP that is none"
    elif isinstance(found, ReproducedRow):
        for name in PAPER_METRICS:
            values = list(found.measured[name].values)
            assert all(type(x) is float and 0 <= x <= 100 for x in values), f"no {name}"
            assert math.isfinite(found.measured[name].mean)


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
