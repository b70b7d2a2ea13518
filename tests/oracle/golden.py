"""Inputs of the golden arrays: what `make_golden.py` (PyTorch) and `golden_test.py` share."""

from __future__ import annotations

from pathlib import Path

from alignps_jax.types import Batch
from tests.oracle.scenes import make_scene

FOLDER = Path(__file__).parents[1] / "golden"
# Small copies of the released models; more channels than the 64 of a queue's slot that are written.
WIDTHS = {"width": 8, "channels": 96, "groups": 8}
MEMORY = {"lut_size": 12, "queue_size": 9}
SIZE = (122, 154)
# The PRW models' inference differs in weights only.
INFERENCE = ("cuhk", "cuhk_plus")
TRAINING = ("cuhk", "prw")
STEPS = 20
# Every rule within these steps: both drops, some gradients clipped, a decay that matters.
RULES = {"warmup": 8, "drops": (5, 12), "clip_norm": 15.0, "weight_decay": 1e-3}


def scenes() -> list[Batch]:
    """The fixed batches, taken in turn; inference takes the first image."""
    return [make_scene(seed, MEMORY["lut_size"], SIZE) for seed in (20, 21)]
