"""Compiled programs on disk that were damaged, or never completed, are not run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib

import pytest

from alignps_jax.seals import Seals
from tests.places import ROOT

# Compiles two programs, and prints what one of them gives.
PROGRAM = """
import sys
from pathlib import Path
import jax
from alignps_jax.devices import use_compilation_cache
use_compilation_cache(Path(sys.argv[1]), alone=True)
print(float(jax.jit(lambda x: x * 3)(2.0)), float(jax.jit(lambda x: x + 70)(2.0)))
"""


def run(folder) -> str:
    words = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def entries(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*-cache"))}


def damaged(content: bytes, how: str, other: bytes) -> bytes:
    inner = bytearray(zlib.decompress(content))
    inner[len(inner) // 2] ^= 1
    return {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "behind the compression": zlib.compress(inner),
        "another program": other,
    }[how]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "xla_cache"
    assert run(folder) == "6.0 72.0\n"
    return folder


def test_sealed_programs_are_used_again(compiled):
    before = {path: path.stat().st_mtime_ns for path in compiled.glob("*-cache")}
    assert len(before) >= 2
    assert run(compiled) == "6.0 72.0\n"
    assert {path: path.stat().st_mtime_ns for path in compiled.glob("*-cache")} == before


@pytest.mark.parametrize("how", ["cut", "empty", "behind the compression", "another program"])
def test_damaged_programs_are_compiled_anew(compiled, how):
    sound = entries(compiled)
    contents = list(sound.values())
    for (name, content), other in zip(sound.items(), contents[1:] + contents[:1], strict=True):
        (compiled / name).write_bytes(damaged(content, how, other))
    assert run(compiled) == "6.0 72.0\n"
    healed = entries(compiled)
    assert healed.keys() == sound.keys()
    assert Seals(compiled).drop_damaged(alone=True) == 0


def test_what_was_not_completed_is_dropped(tmp_path):
    seals, content = Seals(tmp_path), zlib.compress(b"program" * 100)
    seals.add_new()
    assert not (tmp_path / "seals").exists()
    (tmp_path / "good-cache").write_bytes(content)
    (tmp_path / "torn-cache").write_bytes(content[:-20])  # there was no room
    (tmp_path / "good-atime").write_bytes(b"time")
    seals.add_new()
    (tmp_path / "late-cache").write_bytes(content)  # killed before it was sealed
    # Another process may be about to seal the last two, unless there is none, or time has passed.
    assert Seals(tmp_path).drop_damaged(alone=False) == 0
    old = time.time() - 100
    os.utime(tmp_path / "late-cache", (old, old))
    assert Seals(tmp_path).drop_damaged(alone=False) == 1
    assert Seals(tmp_path).drop_damaged(alone=True) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"good-cache", "good-atime", "seals"}
    with (tmp_path / "seals").open("a") as file:
        file.write("torn line good-cache")
    assert Seals(tmp_path).drop_damaged(alone=True) == 0
    (tmp_path / "seals").write_bytes(b"\xff\0" * 99)
    assert Seals(tmp_path).drop_damaged(alone=True) == 1


def test_a_folder_that_is_missing_has_nothing_to_drop(tmp_path):
    assert Seals(tmp_path / "none").drop_damaged(alone=True) == 0
