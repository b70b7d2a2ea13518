"""Who knows what, beyond who imports whom (`make lint` checks that)."""

import re

from tests.places import ROOT

# What one has to do with the axis of devices.
AXIS_WORDS = re.compile(
    r"\b(AXIS|axis_(name|size|index)|p(sum|mean|max|min|permute|sum_scatter)|all_(gather|to_all))\b"
)


def test_only_the_step_and_the_devices_know_the_axis_of_devices():
    folders = ("configs", "alignps_jax", "data_pipeline")
    files = [
        ROOT / "launch.py",
        *(file for name in folders for file in (ROOT / name).rglob("*.py")),
    ]
    found = {str(file.relative_to(ROOT)) for file in files if AXIS_WORDS.search(file.read_text())}
    assert found == {"alignps_jax/training/step.py", "alignps_jax/devices.py"}
