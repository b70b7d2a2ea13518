"""The benchmark runs, on tiny shapes, and writes its tables."""

import json

import pytest

from tests.benchmark.__main__ import main


@pytest.mark.parametrize("part", ["deform_conv", "gallery"])
def test_a_quick_run_writes_rows(part, tmp_path):
    assert main(["--quick", "--runs=1", f"--what={part}", f"--workdir={tmp_path}"]) == 0
    rows = json.loads((tmp_path / f"{part}.json").read_text())["rows"]
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))
    assert len((tmp_path / f"{part}.md").read_text().splitlines()) == 2 + len(rows)
