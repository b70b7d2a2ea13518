"""Which process made something, and whether it is still there."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path
from typing import Any, Self

import psutil

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
