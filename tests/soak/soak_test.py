"""A short slice of `make soak`."""

import os
import subprocess
import sys

import pytest

from tests.places import ROOT
from tests.soak.results import differences
from tests.training.train_test import environment


@pytest.mark.skipif("SOAK" not in os.environ, reason="takes minutes; SOAK=1 runs it, as make soak")
def test_runs_that_are_killed_and_resumed_equal_one_that_is_not(tmp_path):
    command = [sys.executable, "-m", "tests.soak", "--kills=5", "--stops=1", "--full=2"]
    done = subprocess.run(
        [*command, "--second=1", "--seed=2", f"--keep={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert table["  in all"] == "5"
    assert table["findings"] == "0"


def test_differences_are_named():
    expected = {"log": [1], "score of step 3": "0.5", "left over": []}
    assert differences(expected, expected) == []
    found = {"log": [2], "left over": [], "score of step 6": "0.5"}
    assert differences(found, expected) == ["log", "score of step 3", "score of step 6"]
