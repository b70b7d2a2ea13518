"""Inputs of the golden arrays: what `make_golden.py` (PyTorch) and `golden_test.py` share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.oracle.scenes import Scene, make_scene

FOLDER = Path(__file__).parents[1] / "golden"
# Small copies of the released models; more channels than the 64 of a queue's slot that are written.
WIDTHS = {"width": 8, "channels": 96, "groups": 8}
MEMORY = {"lut_size": 12, "queue_size": 9}
SIZE = (122, 154)
# The PRW models' inference differs in weights only.
INFERENCE = ("cuhk", "cuhk_plus")
TRAINING = ("cuhk", "prw")
STEPS = 2
RULES = {"warmup": 2, "drops": (3,)}
WEIGHT_DECAY = 1e-3


def image() -> np.ndarray:
    """A BGR image, [H, W, 3]."""
    return make_scene(11, MEMORY["lut_size"], SIZE).images[0]


def scenes() -> list[Scene]:
    """One per training step."""
    return [make_scene(seed, MEMORY["lut_size"], SIZE) for seed in range(20, 20 + STEPS)]
