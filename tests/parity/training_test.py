"""The training step and the optimizer against the PyTorch oracle (`make parity`).

Every comparison is a process of its own: one for each precision.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.places import ROOT

pytest.importorskip("torch", reason="make parity runs these")
pytest.importorskip("torchvision", reason="make parity runs these")

from tests.parity.common import MODELS, ROI_MODELS

ALL, SOME = MODELS + ROI_MODELS, ("cuhk", "prw_plus")


def at_most(bound: float, *figures: str, **others: float) -> dict[str, float]:
    """A bound of losses, memories and `figures` (see steps.py), and those of `others`."""
    return dict.fromkeys(("losses", "memory", "roi_memory", *figures), bound) | others


# Case (see steps.py), whether in float64, models, and how much each figure may differ at most. What
# float32 leaves open there with rough weights is rounding, and nothing else. Training is chaotic
# at first: from the initial state, float32 rounding alone grows beyond 1e-3. Offsets of exactly
# zero put every sample on a kink of the interpolation, and an empty memory makes for large
# gradients. Where a sample then ends up on the other side, even in float64, it shows in an offset
# bias, itself still next to zero.
COMPARED = [
    ("trained", False, ALL, at_most(1e-4, "frozen", norm=1e-3, tensor=1e-2)),
    ("converted", False, MODELS, at_most(1e-3, "params")),
    # Mutual information is a difference of large numbers.
    ("converted", False, ROI_MODELS, at_most(1e-3, "frozen", "params", losses=1e-2)),
    ("rough", True, SOME, at_most(1e-10, "norm", "tensor")),
    ("rough", True, ("prw_roi",), at_most(1e-12, "frozen", "norm", "tensor")),
    ("converted", True, SOME, at_most(1e-6, "params")),
    ("converted", True, ("prw_roi",), at_most(1e-12, "frozen", "params", "norm", "tensor")),
    ("initial", True, SOME, at_most(1e-6, params=1e-3)),
]


@pytest.mark.parametrize(
    ("case", "wide", "name", "most"),
    [(case, wide, name, most) for case, wide, names, most in COMPARED for name in names],
)
def test_steps(case, wide, name, most):
    wrapper = ["tests.parity.in_float64"] * wide
    done = subprocess.run(
        [sys.executable, "-m", *wrapper, "tests.parity.steps", case, name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    unchanged, frozen = found.pop("unchanged"), ("backbone.conv1", "backbone.layer1")
    print(f"\n{case} {name} {'float64' if wide else 'float32'}: {found}")
    assert found["gradients"] > 100
    assert found["changed"]["frozen"] == (8 if name in ROI_MODELS else 0)  # running statistics
    if "params" in most:
        assert found["changed"]["params"] > 100
        assert all(key.startswith(frozen) for key in unchanged)
        assert case == "initial" or 0 < found["clipped"] < 20
    assert {key: found[key] for key in most if found[key] > most[key]} == {}
