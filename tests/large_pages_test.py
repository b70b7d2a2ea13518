"""The program's restart with large memory pages."""

import os
import platform
import subprocess
import sys

import pytest

from alignps_jax.large_pages import SETTINGS

PROGRAM = f"""
import os, sys
from alignps_jax.large_pages import restart_with_large_pages
print(os.getpid(), flush=True)
restart_with_large_pages()
print(os.environ[{SETTINGS!r}], *sys.argv[1:])
"""


def run(tmp_path, **environment):
    """The lines that a program prints before and after it asked for large pages."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != SETTINGS}
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
    assert last == "glibc.malloc.hugetlb=1 --flag=a b c"


def test_leaves_settings_alone(tmp_path):
    _, last = run(tmp_path, **{SETTINGS: "glibc.malloc.arena_max=2"})
    assert last == "glibc.malloc.arena_max=2 --flag=a b c"
