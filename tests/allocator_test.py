"""The program's restart with settings of the memory allocator."""

import os
import platform
import subprocess
import sys

import pytest

from alignps_jax import allocator
from alignps_jax.allocator import VARIABLE, settings

PROGRAM = f"""
import os, sys
from alignps_jax.allocator import restart_with_settings
print(os.getpid(), flush=True)
restart_with_settings()
print(os.environ[{VARIABLE!r}], *sys.argv[1:])
"""


def run(tmp_path, **environment):
    """The lines that a program prints before and after it asked for large pages."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-u", program, "--flag=a b", "c"],
        env={**inherited, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_restarts_once_in_the_same_process_with_the_same_arguments(tmp_path):
    first, second, last = run(tmp_path)
    assert first == second
    assert last == f"{settings()} --flag=a b c"


def test_leaves_settings_alone(tmp_path):
    _, last = run(tmp_path, **{VARIABLE: "glibc.malloc.arena_max=2"})
    assert last == "glibc.malloc.arena_max=2 --flag=a b c"


@pytest.mark.parametrize(
    ("library", "version", "count"),
    [
        ("", "", 0),
        ("musl", "1.2", 0),
        ("glibc", "2.35", 1),
        ("glibc", "2.36", 3),
        ("glibc", "3.0", 3),
    ],
)
def test_settings_suit_the_c_library(library, version, count, monkeypatch):
    """Before 2.36 it refuses to keep large arrays, and would ask the system for every one."""
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (library, version))
    assert len([one for one in settings().split(":") if one]) == count
