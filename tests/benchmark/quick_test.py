"""The benchmark runs, on tiny shapes, and writes its tables."""

import json

import pytest

from tests.benchmark import deform_conv, roi_align
from tests.benchmark.__main__ import main


@pytest.mark.parametrize("part", ["deform_conv", "roi_align", "gallery"])
def test_a_quick_run_writes_rows(part, tmp_path, monkeypatch):
    monkeypatch.setattr(deform_conv, "LAYERS", {"tower, modulated": (8, 4, 6, 7)})
    monkeypatch.setattr(roi_align, "MAP", (6, 7, 4))
    main(["--runs=1", f"--what={part}", f"--workdir={tmp_path}", "--people=9"])
    rows = json.loads((tmp_path / f"{part}.json").read_text())["rows"]
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))
    assert len((tmp_path / f"{part}.md").read_text().splitlines()) == 2 + len(rows)
