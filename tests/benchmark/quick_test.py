"""The benchmark runs, on tiny shapes, and writes its table."""

import json

from tests.benchmark.__main__ import main


def test_a_quick_run_writes_a_row_of_each_part(tmp_path):
    parts = ["deform_conv", "toim", "data", "search"]
    assert main(["--quick", "--runs=1", f"--what={','.join(parts)}", f"--workdir={tmp_path}"]) == 0
    written = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    assert list(written) == parts
    assert (tmp_path / "benchmark.md").read_text().count("## ") == len(parts)


def test_an_unknown_part_is_one_line(tmp_path, capsys):
    assert main(["--quick", "--what=speed", f"--workdir={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
