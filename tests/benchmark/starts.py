"""Seconds from a command to its first result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from alignps_jax.experiments.benchmark import Row
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.types import UserError
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE
from alignps_jax.weights.tensor_files import write_tensors
from configs import cuhk
from tests.benchmark.measure import Context
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import released_shapes
from tests.places import ROOT

FIRST_STEP = "first step done"
DETECT = """
import sys, numpy as np
from alignps_jax import Detector
detector = Detector.from_checkpoint(sys.argv[1])
detector.detect(np.zeros((900, 1500, 3), np.uint8))
print("detected", flush=True)
"""


class Commands:
    """Commands with files and caches of their own below `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def prepare(self, weights: Path) -> None:
        """Draws the tiny data set, and converts the detector."""
        self.train(cold=True)
        own = "--config=configs/cuhk.py:released", f"--workdir={self._folder / 'detector'}"
        self.launch("--mode=convert", f"--source={weights}", *own)

    def train(self, *, cold: bool) -> None:
        """The first training step of configs/tiny.py."""
        run = self._folder / "run"
        shutil.rmtree(run if cold else run / "checkpoints", ignore_errors=True)
        data = f"--config.data.root={self._folder / 'data'}"
        self.launch("--config=configs/tiny.py", f"--workdir={run}", data, until=FIRST_STEP)

    def detect(self, *, cold: bool) -> None:
        """The first detection of `Detector` in a photo of 1500x900."""
        if cold:
            shutil.rmtree(self._folder / "cache", ignore_errors=True)
        self._run(["-c", DETECT, str(self._folder / "detector")], until="detected")

    def launch(self, *flags: str, until: str = "") -> None:
        """Runs launch.py, to its end or until it prints a line that begins with `until`."""
        self._run(["launch.py", *flags], until=until)

    def _run(self, words: Sequence[str], *, until: str = "") -> None:
        cache = str(self._folder / "cache")
        own = {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            said: list[str] = []
            for line in process.stdout or ():
                said.append(line.strip())
                if until and line.strip().startswith(until):
                    process.kill()
                    return
        if until or process.returncode:
            raise UserError(f"{' '.join(words[:2])}: ended with {said[-3:]}")


def rows(context: Context) -> Iterator[Row]:
    """Cold starts compile everything; warm ones find what the cold ones left in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        weights = Path(folder) / "detector.safetensors"
        _write_detector(weights)
        commands.prepare(weights)
        for name, start in STARTS.items():
            yield context.row(name, {"ours": partial(start, commands)})


STARTS: dict[str, Callable[[Commands], None]] = {
    "--help": lambda commands: commands.launch("--help"),
    "--mode=search --help": lambda commands: commands.launch("--mode=search", "--help"),
    "first training step of configs/tiny.py, cold": partial(Commands.train, cold=True),
    "first training step of configs/tiny.py, warm": partial(Commands.train, cold=False),
    "first detection at 1500×900, cold": partial(Commands.detect, cold=True),
    "first detection at 1500×900, warm": partial(Commands.detect, cold=False),
}


def _write_detector(file: Path) -> None:
    """A detector of the published width, with random weights."""
    template = weights_template(build_model(cuhk.get_config("released")))
    shapes = released_shapes({"params": template.params, "frozen": template.frozen})
    shapes |= {LOOKUP_TABLE: (5532, 256), QUEUE: (5000, 256), QUEUE.replace("queue", "tail"): ()}
    write_tensors(file, random_state_dict(shapes, seed=0), {})
