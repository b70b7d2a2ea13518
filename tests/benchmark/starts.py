"""Seconds from a command to its first result, beside those of another checkout, in turns.

python -m tests.benchmark --what=starts --against=../before
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

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


class Checkout:
    """A checkout of this project, with files and caches of its own below `folder`."""

    def __init__(self, root: Path, folder: Path):
        self._root, self._folder = root, folder
        folder.mkdir(parents=True)
        self.photo = folder / "photos" / "photo.jpg"
        self.photo.parent.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (45, 75, 3), dtype=np.uint8)
        cv2.imwrite(str(self.photo), cv2.resize(noise, (1500, 900)))

    def prepare(self, weights: Path) -> None:
        """Draws the tiny data set, converts the detector, and indexes one photo."""
        self.train(cold=True)
        own = "--config=configs/cuhk.py:released", f"--workdir={self._folder / 'detector'}"
        self.launch("--mode=convert", f"--source={weights}", *own)
        self.launch("--mode=index", f"--source={self.photo.parent}", *self._gallery())

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

    def search(self) -> None:
        """`--mode=search` of one photo in a gallery, with compiled programs in the cache."""
        places = f"--query={self.photo}", f"--workdir={self._folder / 'search'}"
        self.launch("--mode=search", *places, *self._gallery())

    def launch(self, *flags: str, until: str = "") -> None:
        """Runs launch.py, to its end or until it prints a line that begins with `until`."""
        self._run(["launch.py", *flags], until=until)

    def _gallery(self) -> tuple[str, str]:
        detector, gallery = self._folder / "detector", self._folder / "people.lance"
        return f"--checkpoint={detector}", f"--gallery={gallery}"

    def _run(self, words: Sequence[str], *, until: str = "") -> None:
        cache = str(self._folder / "cache")
        own = {"PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": cache, "PYTHONPATH": str(self._root)}
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=self._root,
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
        checkouts = {"ours": Checkout(ROOT, Path(folder) / "ours")}
        if context.against:
            checkouts["before"] = Checkout(context.against.resolve(), Path(folder) / "before")
        weights = Path(folder) / "detector.safetensors"
        _write_detector(weights)
        for checkout in checkouts.values():
            checkout.prepare(weights)
        for name, start in STARTS.items():
            works = {key: partial(start, each) for key, each in checkouts.items()}
            yield context.row(name, works)


STARTS: dict[str, Callable[[Checkout], None]] = {
    "--help": lambda checkout: checkout.launch("--help"),
    "--mode=search --help": lambda checkout: checkout.launch("--mode=search", "--help"),
    "first training step of configs/tiny.py, cold": lambda checkout: checkout.train(cold=True),
    "first training step of configs/tiny.py, warm": lambda checkout: checkout.train(cold=False),
    "first detection at 1500×900, cold": lambda checkout: checkout.detect(cold=True),
    "first detection at 1500×900, warm": lambda checkout: checkout.detect(cold=False),
    "search of one photo in a gallery, warm": lambda checkout: checkout.search(),
}


def _write_detector(file: Path) -> None:
    """A detector of the published width, with random weights."""
    template = weights_template(build_model(cuhk.get_config("released")))
    shapes = released_shapes({"params": template.params, "frozen": template.frozen})
    shapes |= {LOOKUP_TABLE: (5532, 256), QUEUE: (5000, 256), QUEUE.replace("queue", "tail"): ()}
    write_tensors(file, random_state_dict(shapes, seed=0), {})
