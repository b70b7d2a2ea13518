"""Which process made something, and whether it is still there."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path
from typing import Any, Self

import psutil

# Two views of one process's start, which the system counts from its own, adjusted start.
_SAME_START = 2.0


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, now or in the past, with its start in seconds since 1970."""

    host: str
    pid: int
    started: float
    machine: str

    def __str__(self) -> str:
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {start}"

    @classmethod
    def this(cls) -> Self:
        """The present one."""
        started = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), started, this_machine())

    @classmethod
    def parse(cls, content: Any) -> Process | None:
        """From `dataclasses.asdict`, by way of a file; None from anything else."""
        try:
            process = cls(**content)
        except TypeError:
            return None
        kinds = tuple(map(type, dataclasses.astuple(process)))
        sound = kinds == (str, int, float, str) and 0 < process.pid < 2**31
        sound = sound and 0 <= process.started < 2**40 and process.host.isprintable()
        return process if sound and len(process.host) <= 255 else None

    def is_running(self) -> bool | None:
        """Whether it is there, and no other took its number; None: it is of another machine."""
        if self.machine != this_machine():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < _SAME_START
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


def this_machine() -> str:
    """The running system and its numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
