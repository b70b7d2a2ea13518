"""Time from the command to the first training step, and how many programs an epoch takes."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark.measure import Timing
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.monitor import FIRST_STEP
from alignps_jax.types import UserError
from alignps_jax.weights.tensor_files import write_tensors
from configs import tiny
from data_pipeline.datasets import prepare
from data_pipeline.transforms import buckets
from tests.benchmark.measure import Context, Row
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import released_shapes

LAUNCH = Path(__file__).parents[2] / "launch.py"


def rows(context: Context, launcher: Path = LAUNCH) -> Iterator[Row]:
    """Cold and warm starts of a tiny network and of the configured one.

    The configured one trains on a few drawn scenes at its smallest scale: that changes how long a
    step takes, not what there is to compile.
    """
    epoch = (
        f"{len(buckets(context.config.data.train_scales))} programs at most in an epoch of "
        f"{context.config.data.name}: one per training scale and orientation"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        yield from _starts("configs/tiny.py", tiny.get_config(), root / "tiny", launcher, "")
        if not context.quick:
            config = ConfigDict(context.config.to_dict())
            yield from _starts(
                "the configured network", config, root / "configured", launcher, epoch
            )


def _starts(
    name: str, config: ConfigDict, folder: Path, launcher: Path, note: str
) -> Iterator[Row]:
    """A start without compiled programs, and one that finds those of the first."""
    _few_scenes(config, folder / "data")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(config.data)
    if config.model.backbone == "resnet50":
        config.model.pretrained = str(_write_backbone(config, folder / "resnet50.safetensors"))
    _write_config(config, folder / "config.py")
    cold = _seconds_to_first_step(folder, launcher)
    yield Row("compile", f"first step, cold: {name}", _once(cold), note=note)
    warm = _seconds_to_first_step(folder, launcher)
    size = sum(file.stat().st_size for file in (folder / "run" / "xla_cache").rglob("*"))
    yield Row(
        "compile",
        f"first step, warm: {name}",
        _once(warm),
        note=f"{warm / cold:.0%} of the cold start; cache in the workdir, {size / 1e6:.1f} MB",
    )


def _few_scenes(config: ConfigDict, root: Path) -> None:
    """Turns it to drawn scenes, few and small, and to a single step."""
    scale = min(config.data.train_scales)
    config.data = tiny.get_config().data
    config.data.root = str(root)
    config.data.train_scales = (scale,)
    config.data.test_scale = scale
    config.train.duration = "1 steps"


def _write_backbone(config: ConfigDict, path: Path) -> Path:
    """A ResNet-50 with random weights, under torchvision's names."""
    template = weights_template(build_model(config))
    shapes = released_shapes({"params": template.params, "frozen": template.frozen})
    tensors = random_state_dict(shapes, seed=0)
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    write_tensors(path, backbone | {"fc.weight": np.zeros((1, 1), np.float32)}, {})
    return path


def _write_config(config: ConfigDict, path: Path) -> None:
    """A file for `--config`, whose values are Python literals."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )


def _seconds_to_first_step(folder: Path, launcher: Path) -> float:
    """From the command to the line that says that the first step is done; training ends there."""
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(launcher), *flags],
        cwd=LAUNCH.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        last = "nothing"
        try:
            for line in process.stdout:
                if line.strip().startswith(FIRST_STEP):
                    return time.perf_counter() - start
                last = line.strip() or last
        finally:
            process.kill()
    raise UserError(f"training for the benchmark: ended with {last!r}, expected {FIRST_STEP!r}")


def _once(seconds: float) -> Timing:
    return Timing.of([seconds])
