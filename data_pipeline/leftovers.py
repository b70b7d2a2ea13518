"""What preparations of a data set left behind when they were killed.

TFDS writes to `incomplete.<random>_<version>` and renames the folder at the end. Each such folder
names the process that writes it; it is removed once that process is certainly gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil

_MAKER = "prepared_by.json"
_MAX_BYTES = 4096
_SAME_START = 2.0  # seconds: the system counts from its own, adjusted start


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, now or in the past, with its start in seconds since 1970."""

    host: str
    pid: int
    started: float
    machine: str  # the running system and its numbering of processes

    def __str__(self) -> str:
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {start}"

    @classmethod
    def this(cls) -> Self:
        """The present one."""
        machine = host = socket.gethostname()
        if (boot := Path("/proc/sys/kernel/random/boot_id")).exists():
            machine = f"{host} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        return cls(host, os.getpid(), psutil.Process().create_time(), machine)

    @classmethod
    def parse(cls, content: Any) -> Process | None:
        """From `dataclasses.asdict`, by way of a file; None from anything else."""
        try:
            found = cls(**content)
        except TypeError:
            return None
        sound = tuple(map(type, dataclasses.astuple(found))) == (str, int, float, str)
        sound = sound and 0 < found.pid < 2**31 and 0 <= found.started < 2**40
        return found if sound and found.host.isprintable() else None

    def is_running(self) -> bool | None:
        """Whether it is there, and no other took its number; None: it is of another machine."""
        if self.machine != Process.this().machine:
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _SAME_START
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


def sign(folder: Path) -> None:
    """Notes in a folder that this process writes it."""
    (folder / _MAKER).write_text(json.dumps(dataclasses.asdict(Process.this())))


def clear_leftovers(folder: Path) -> Iterator[str]:
    """Removes the unfinished folders of dead processes below `folder`, that of a data set.

    Yields:
      A line for each unfinished folder: removed, or why not.
    """
    for path in sorted(folder.glob("*/incomplete.*")):
        maker = _maker_of(path)
        if maker is None:
            yield f"{path}: unfinished, and does not say which process writes it; it stays"
        elif maker.is_running() is None:
            yield f"{path}: unfinished; whether {maker}, still writes it cannot be seen; it stays"
        elif maker.is_running():
            yield f"{path}: {maker}, is writing it"
        else:
            yield _removed(path, maker)


def _removed(path: Path, maker: Process) -> str:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # somebody else was faster
        pass
    except OSError as error:
        return f"{path}: left by {maker}, cannot be removed ({error.strerror or error})"
    with contextlib.suppress(OSError):  # something else is there
        path.parent.rmdir()
    return f"{path}: removed, {maker}, had left it unfinished"


def _maker_of(path: Path) -> Process | None:
    try:
        with (path / _MAKER).open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, _MAX_BYTES))
        return Process.parse(json.loads(content))
    except (OSError, ValueError, RecursionError):
        return None
