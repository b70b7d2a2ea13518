"""One writer per workdir: who is alive, who is dead, and who is only asleep.

Run as a program (`python -m tests.checkpoint.lock_test <workdir>`) this file is a process that
holds a lock until it is killed or its input ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alignps_jax.checkpoint.lock import (
    NAME,
    Holder,
    WorkdirLock,
    kernel_lock,
)
from alignps_jax.processes import Process
from alignps_jax.types import UserError
from tests.places import ROOT

QUICK = {"heartbeat": 0.05, "patience": 0.5}


def start_holder(workdir: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.lock_test", str(workdir)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process.first_line = process.stdout.readline().strip()
    return process


def write(workdir: Path, holder: Holder) -> None:
    (workdir / NAME).write_text(json.dumps(dataclasses.asdict(holder)))


def no_kernel_locks(file: int) -> None:
    """What `kernel_lock` says on file systems without locks."""


def like_this_process(**changes) -> Holder:
    return Holder(dataclasses.replace(Process.this(), **changes), "a token")


def elsewhere() -> Holder:
    """A process of another machine, whose number and start are those of a live one here."""
    return like_this_process(host="elsewhere", machine="another system")


def test_a_second_writer_is_refused_by_name_until_the_first_is_killed(tmp_path):
    process = start_holder(tmp_path)
    assert process.first_line == "holds"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        WorkdirLock(tmp_path).acquire()
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: found another run that writes there (process ")
    assert f"process {process.pid} on {os.uname().nodename}, started 2" in message
    assert "\n" not in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    process.kill()
    process.wait()
    assert (tmp_path / NAME).exists()
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"]["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_a_lock_ends_with_its_block_and_leaves_no_folder_that_it_made(tmp_path):
    workdir = tmp_path / "runs" / "new"
    with WorkdirLock(workdir):
        assert [path.name for path in workdir.iterdir()] == [NAME]
    assert not workdir.exists()
    with WorkdirLock(workdir) as lock:
        (workdir / "config.json").touch()
        lock.release()
        lock.release()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_of_many_at_once_one_gets_it(tmp_path):
    """Over a dead holder's lock, where all of them see that it may be taken."""
    for turn in range(20):
        workdir = tmp_path / str(turn)
        workdir.mkdir()
        write(workdir, like_this_process(pid=2**22 - 1))
        locks = [WorkdirLock(workdir) for _ in range(8)]

        def attempt(lock):
            try:
                lock.acquire()
            except UserError:
                return False
            return True

        with ThreadPoolExecutor(len(locks)) as pool:
            assert sum(pool.map(attempt, locks)) == 1
        for lock in locks:
            lock.release()


@pytest.mark.parametrize("lock", [kernel_lock, no_kernel_locks])
def test_a_dead_holder_of_this_machine_costs_no_wait(tmp_path, lock):
    write(tmp_path, like_this_process(started=Process.this().started - 60))
    began = time.monotonic()
    with WorkdirLock(tmp_path, heartbeat=0.05, patience=60, lock=lock):
        assert time.monotonic() - began < 5


def test_without_kernel_locks_a_live_process_is_seen_by_number_and_start(tmp_path):
    write(tmp_path, like_this_process())
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        WorkdirLock(tmp_path, **QUICK, lock=no_kernel_locks).acquire()


@pytest.mark.parametrize("lock", [kernel_lock, no_kernel_locks])
def test_another_machine_is_dead_once_its_heart_is_seen_not_to_beat(tmp_path, lock, capsys):
    write(tmp_path, elsewhere())
    with WorkdirLock(tmp_path, **QUICK, lock=lock):
        assert "on elsewhere" not in (tmp_path / NAME).read_text()
    assert "is held by process" in capsys.readouterr().out


@pytest.mark.parametrize("lock", [kernel_lock, no_kernel_locks])
def test_another_machine_that_is_alive_is_refused(tmp_path, lock):
    write(tmp_path, elsewhere())
    with ThreadPoolExecutor() as pool:
        attempt = pool.submit(WorkdirLock(tmp_path, heartbeat=0.05, patience=60, lock=lock).acquire)
        time.sleep(0.3)
        os.utime(tmp_path / NAME)  # as its holder does
        with pytest.raises(UserError, match="on elsewhere, started"):
            attempt.result(timeout=10)
    assert "elsewhere" in (tmp_path / NAME).read_text()


@pytest.mark.parametrize("loss", ["removed", "taken over"])
def test_a_holder_that_lost_its_lock_stops(tmp_path, loss):
    process = start_holder(tmp_path)
    if loss == "removed":
        (tmp_path / NAME).unlink()
    else:
        write(tmp_path, elsewhere())
    output, _ = process.communicate(timeout=30)  # its input ends only after it has stopped
    assert process.returncode == 2
    assert output.startswith(f"error: {tmp_path / NAME}: found it removed or taken over")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"host": 3}', "\0" * 500, '{"host":' * 3000, "x" * 10**6]
)
def test_garbage_names_nobody(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"]["pid"] == os.getpid()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"writer\.lock: cannot be written \("):
        WorkdirLock(tmp_path / "file" / "run").acquire()


if __name__ == "__main__":
    with WorkdirLock(Path(sys.argv[1]), heartbeat=0.05):
        print("holds", flush=True)
        time.sleep(20)
