"""Who knows what, beyond who imports whom (`make lint` checks that)."""

from __future__ import annotations

import ast

from tests.places import ROOT

# What one has to do with the axis of devices.
AXIS_WORDS = {
    *("AXIS", "axis_name", "axis_size", "axis_index"),
    *("psum", "pmean", "pmax", "pmin", "ppermute", "psum_scatter", "all_gather", "all_to_all"),
}
PRODUCT = [ROOT / "launch.py", *(ROOT / "configs").rglob("*.py")]
PRODUCT += [*(ROOT / "alignps_jax").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]


def names(source: str) -> set[str]:
    """Every name, attribute, imported name and keyword of a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
            case ast.keyword(arg=name) | ast.arg(arg=name):
                found.add(name)
    return found


def test_only_the_step_and_the_devices_know_the_axis_of_devices():
    found = {
        str(file.relative_to(ROOT)) for file in PRODUCT if names(file.read_text()) & AXIS_WORDS
    }
    assert found == {"alignps_jax/training/step.py", "alignps_jax/devices.py"}
