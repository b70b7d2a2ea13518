"""Progress in a log file: few lines, no carriage returns."""

import io
import re
import time

import pytest

from alignps_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_loops_write_nothing_to_a_file():
    stream = io.StringIO()
    assert list(progress(range(50), desc="count", unit="number", stream=stream)) == [*range(50)]
    assert stream.getvalue() == ""


@pytest.mark.parametrize("leave", [True, False])
def test_long_loops_write_a_line_now_and_then(leave):
    stream = io.StringIO()
    counts = {"unit": "step", "total": 900, "initial": 100}
    bar = progress(desc="train", **counts, leave=leave, stream=stream, seconds=0.2)
    start = time.monotonic()
    while time.monotonic() < start + 1.0:
        time.sleep(0.002)
        bar.update()
        bar.set_postfix_str("loss 1.5", refresh=False)
    bar.close()
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert 2 <= len(lines) <= 6 + leave
    for line in lines:
        assert re.match(r"train: \d+ of 900 \[.*step/s, loss 1.5\]$", line), line


def test_unknown_totals():
    stream = io.StringIO()
    for _ in progress(iter(range(3)), desc="read", unit="file", stream=stream, seconds=0.0):
        pass
    assert "read: 3 of ?" in stream.getvalue()


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    list(progress(range(5), desc="count", unit="number", stream=stream))
    assert "\r" in stream.getvalue()
    assert "100%" in stream.getvalue()


def test_disabled_bars_write_nothing():
    stream = Terminal()
    list(progress(range(5), desc="count", unit="number", stream=stream, disable=True))
    assert stream.getvalue() == ""
