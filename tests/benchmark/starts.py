"""Seconds from a command to its first result, beside those of another checkout, in turns.

python -m tests.benchmark --what=starts --against=../before
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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

# All files of a checkout lie below {0}.
DETECT = """
import numpy as np
from alignps_jax import Detector
detector = Detector.from_checkpoint("{0}/detector")
detector.detect(np.zeros((900, 1500, 3), np.uint8))
print("detected", flush=True)
"""
TRAIN = ["launch.py", "--config=configs/tiny.py", "--workdir={0}/run"]
TRAIN += ["--config.data.root={0}/data"]
CONVERT = ["launch.py", "--mode=convert", "--config=configs/cuhk.py:released"]
CONVERT += ["--workdir={0}/detector"]
GALLERY = ["--checkpoint={0}/detector", "--gallery={0}/people.lance"]
INDEX = ["launch.py", "--mode=index", "--source={0}/photos", *GALLERY]
SEARCH = ["launch.py", "--mode=search", "--query={0}/photos/photo.jpg", "--workdir={0}/search"]
# By name: what is deleted before, the command, and the line that ends it, if not its end.
STARTS = {
    "--help": ("", ["launch.py", "--help"], ""),
    "first training step of configs/tiny.py, cold": ("run", TRAIN, "first step done"),
    "first training step of configs/tiny.py, warm": ("run/checkpoints", TRAIN, "first step done"),
    "first detection at 1500×900, cold": ("cache", ["-c", DETECT], "detected"),
    "first detection at 1500×900, warm": ("", ["-c", DETECT], "detected"),
    "search of one photo in a gallery, warm": ("", [*SEARCH, *GALLERY], ""),
}


def start(root: Path, folder: Path, lost: str, words: list[str], until: str = "") -> None:
    """Runs Python in a checkout, to the end or until it prints a line that begins with `until`."""
    if lost:
        shutil.rmtree(folder / lost, ignore_errors=True)
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-u", *(word.format(folder) for word in words)],
        cwd=root,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said: list[str] = []
        for line in process.stdout or ():
            said.append(line.strip())
            if until and line.startswith(until):
                process.kill()
                return
    if until or process.returncode:
        raise UserError(f"{' '.join(words[:2])}: ended with {said[-3:]}")


def rows(context: Context) -> Iterator[Row]:
    """Cold starts compile everything; warm ones find what the cold ones left in the cache."""
    with tempfile.TemporaryDirectory() as temporary:
        roots = {"ours": ROOT}
        roots |= {"before": context.against.resolve()} if context.against else {}
        checkouts = {name: (root, Path(temporary) / name) for name, root in roots.items()}
        weights = Path(temporary) / "detector.safetensors"
        _write_detector(weights)
        for place in checkouts.values():
            _write_photo(place[1] / "photos" / "photo.jpg")
            start(*place, "", TRAIN, "first step done")
            start(*place, "", [*CONVERT, f"--source={weights}"])
            start(*place, "", INDEX)
        for name, command in STARTS.items():
            works = {key: partial(start, *place, *command) for key, place in checkouts.items()}
            yield context.row(name, works)


def _write_photo(path: Path) -> None:
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (45, 75, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (1500, 900)))


def _write_detector(file: Path) -> None:
    """A detector of the published width, with random weights."""
    template = weights_template(build_model(cuhk.get_config("released")))
    shapes = released_shapes({"params": template.params, "frozen": template.frozen})
    shapes |= {LOOKUP_TABLE: (5532, 256), QUEUE: (5000, 256), QUEUE.replace("queue", "tail"): ()}
    write_tensors(file, random_state_dict(shapes, seed=0), {})
