"""Unfinished folders go when their process is certainly gone, and not a moment earlier."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.leftovers import Process, clear_leftovers, sign
from tests.places import ROOT


def unfinished(folder: Path, maker: Process | None = None, name: str = "A1") -> Path:
    path = folder / "0123456789ab" / f"incomplete.{name}_1.1.0"
    path.mkdir(parents=True)
    (path / "part.array_record").write_bytes(b"photos")
    if maker is not None:
        sign(path)
        (path / "prepared_by.json").write_text(json.dumps(dataclasses.asdict(maker)))
    return path


@pytest.fixture
def gone() -> Process:
    """A process that has ended."""
    code = "import dataclasses, json; from data_pipeline.leftovers import Process; "
    code += "print(json.dumps(dataclasses.asdict(Process.this())))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    process = Process.parse(json.loads(done.stdout))
    assert process is not None
    return process


def test_the_folder_of_a_dead_process_is_removed(tmp_path, gone):
    unfinished(tmp_path, gone)
    (line,) = clear_leftovers(tmp_path)
    assert f"removed, process {gone.pid} on {gone.host}, started " in line
    assert list(tmp_path.iterdir()) == []
    assert list(clear_leftovers(tmp_path)) == []


def test_complete_files_beside_it_stay(tmp_path, gone):
    path = unfinished(tmp_path, gone)
    complete = path.parent / "1.1.0"
    complete.mkdir()
    sign(complete)
    assert len(list(clear_leftovers(tmp_path))) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["1.1.0"]


def test_a_number_that_another_process_has_by_now_is_not_its_maker(tmp_path):
    path = unfinished(tmp_path, dataclasses.replace(Process.this(), started=1000.0))
    assert "removed" in next(clear_leftovers(tmp_path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r": process \d+ on \S+, started .*, is writing it"),
        ({"machine": "other"}, r"unfinished; whether process .* cannot be seen; it stays"),
        ({"host": "other", "machine": "other", "pid": 2**30}, r"on other, .* it stays"),
    ],
)
def test_what_may_be_alive_stays(tmp_path, change, message):
    path = unfinished(tmp_path, dataclasses.replace(Process.this(), **change))
    (line,) = clear_leftovers(tmp_path)
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(line))
    assert "delete" not in line
    assert (path / "part.array_record").is_file()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[1, 2, 3, 4]",
        b'{"pid": 1}',
        b'{"host": "a\\nb", "pid": 1, "started": 1.0, "machine": "m"}',
        b'{"host": "a", "pid": -1, "started": 1.0, "machine": "m"}',
        b'{"host": "a", "pid": 1, "started": NaN, "machine": "m"}',
        b'{"host": "a", "pid": 1, "started": 1.0, "machine": ' + b"[" * 9000,
        b"\xff\xfe",
    ],
)
def test_a_folder_that_names_nobody_stays(tmp_path, content):
    path = unfinished(tmp_path)
    if content is not None:
        (path / "prepared_by.json").write_bytes(content)
    (line,) = clear_leftovers(tmp_path)
    assert line == f"{path}: unfinished, and does not say which process writes it; it stays"
    assert path.is_dir()


def test_a_link_is_not_followed(tmp_path, gone):
    elsewhere = unfinished(tmp_path / "elsewhere", gone)
    (tmp_path / "data" / "0123456789ab").mkdir(parents=True)
    (tmp_path / "data" / "0123456789ab" / "incomplete.B2_1.1.0").symlink_to(elsewhere)
    (line,) = clear_leftovers(tmp_path / "data")
    assert "cannot be removed" in line
    assert (elsewhere / "part.array_record").is_file()
