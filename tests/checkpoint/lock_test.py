"""One writer per workdir.

Run as a program (`python -m tests.checkpoint.lock_test <workdir>`) this file is a process that
holds a lock until it is killed or its input ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignps_jax.checkpoint.lock import NAME, one_writer
from alignps_jax.types import UserError
from tests.places import ROOT


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.lock_test", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_by_name_until_the_first_is_killed(tmp_path, holder):
    for _ in range(2):  # a refusal leaves the name there
        expected = (
            rf"{tmp_path}: found another run .*\(process {holder.pid} on \S+, started 2.*\), "
        )
        with pytest.raises(UserError, match=f"^{expected}.*$"), one_writer(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with one_writer(tmp_path):
        assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_file_that_vanishes_harms_nobody(tmp_path, holder):
    """A moment without it, as on a network file system, once ended days of training unsaved."""
    (tmp_path / NAME).unlink()
    output, _ = holder.communicate("", timeout=30)
    assert (holder.returncode, output) == (0, "through\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with one_writer(tmp_path / "new"):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {tmp_path / 'new' / NAME}: {os.strerror(number)}")


if __name__ == "__main__":
    with one_writer(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.read()
        print("through", flush=True)
