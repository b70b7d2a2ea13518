"""One writer per workdir: a lock file that names the process which writes there.

The kernel's lock on the file (`flock`) is what counts: it ends with its process, however that ends,
and Linux passes it on to servers of NFS 4. Where it says nothing (another machine's kernel, file
systems without such locks), the file's content does: its holder renews the file's time every
`HEARTBEAT` seconds, and stops once the file is not its own any more. So whoever watches it for
`PATIENCE` seconds without a change, by one clock, knows that the holder is dead, or will stop when
it wakes up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Self

from alignps_jax.processes import Process
from alignps_jax.types import UserError

NAME = "writer.lock"
HEARTBEAT = 10.0
PATIENCE = 60.0
# What file systems without kernel locks say.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MAX_CONTENT = 4096


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that writes, or wrote, a workdir; `token` is this lock's alone."""

    process: Process
    token: str

    @classmethod
    def this(cls) -> Self:
        """The present process, with a token of its own at each call."""
        return cls(Process.this(), uuid.uuid4().hex)


def kernel_lock(file: int) -> bool | None:
    """Locks an open file until it is closed.

    Returns False if another process holds the lock, None if the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


class WorkdirLock:
    """The right to write a workdir, which one process has at a time; a context manager.

    `acquire` makes the folder where needed and takes the lock of a holder that is dead. A holder
    that loses its lock (because somebody removed the file, or because it was asleep and another
    machine took over) ends its process with a line and exit code 2, before it can write over what
    the other one does.

    Attributes:
      path: the lock file, which names its holder as JSON.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        heartbeat: float = HEARTBEAT,
        patience: float = PATIENCE,
        lock: Callable[[int], bool | None] = kernel_lock,
    ):
        self.path = Path(workdir) / NAME
        self._heartbeat, self._patience, self._lock = heartbeat, patience, lock
        self._file: int | None = None
        self._made_folder = False
        self._released = threading.Event()
        self._mutex = threading.Lock()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          UserError: another process holds it (one line names it), or the folder cannot be written.
        """
        try:
            self._made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._try()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Removes the lock file, and the folder if it was made for nothing; any thread may."""
        with self._mutex:
            self._released.set()
            if self._file is None:
                return
            with contextlib.suppress(OSError):  # it is nobody's lock, removed or not
                if self._is_mine():
                    self.path.unlink()
                if self._made_folder:
                    self.path.parent.rmdir()
            os.close(self._file)
            self._file = None

    def _try(self) -> None:
        """Takes the lock, or leaves it open to another attempt, or raises UserError."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            granted = self._lock(file)
            holder = _read(file)
            if granted is False:
                self._refuse(holder)
            if not self._is_at_path(file):  # its holder removed it since we opened it
                return
            if holder is not None and self._is_alive(holder, granted):
                self._refuse(holder)
            self._mine = Holder.this()
            content = json.dumps(dataclasses.asdict(self._mine)).encode() + b"\n"
            os.ftruncate(file, 0)
            os.pwrite(file, content, 0)
            if granted is None:
                # Another one may have written at the same moment; the last one has it.
                time.sleep(min(1.0, self._heartbeat))
                if _read(file) != self._mine:
                    self._refuse(_read(file))
            self._file, file = file, -1
        finally:
            if file >= 0:
                os.close(file)

    def _is_alive(self, holder: Holder, granted: bool | None) -> bool:
        running = holder.process.is_running()
        if running is not None:
            return granted is None and running
        print(
            f"note: {self.path} is held by {holder.process}; watching for {self._patience:g} s "
            "whether it is alive",
            flush=True,
        )
        end, before = time.monotonic() + self._patience, self._seen()
        while time.monotonic() < end:
            time.sleep(min(1.0, self._heartbeat))
            if self._seen() != before:
                return True
        return False

    def _seen(self) -> tuple[int, int, int] | None:
        """What a heartbeat changes; opened anew, because network file systems then ask again."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return about.st_ino, about.st_mtime_ns, about.st_size

    def _refuse(self, holder: Holder | None) -> NoReturn:
        who = holder.process if holder else "a process that just starts"
        raise UserError(
            f"{self.path.parent}: found another run that writes there ({who}), expected none; wait "
            "for it, stop it, or choose another --workdir"
        )

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _is_mine(self) -> bool:
        assert self._file is not None
        return self._is_at_path(self._file) and _read(self._file) == self._mine

    def _renew(self) -> None:
        """Gives signs of life until the lock is released; ends the process if it is lost."""
        while not self._released.wait(self._heartbeat):
            with self._mutex:
                if self._file is None:
                    return
                try:
                    os.utime(self._file)
                    lost = not self._is_mine()
                except OSError:  # a server that does not answer now may answer the next time
                    continue
            if lost:
                print(
                    f"error: {self.path}: found it removed or taken over, expected the lock of "
                    f"this run ({self._mine.process}); it stops, its last checkpoint stays",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)


def _read(file: int) -> Holder | None:
    """Who a lock file names; None if nobody, or what no holder wrote."""
    try:
        content = json.loads(os.pread(file, _MAX_CONTENT, 0))
        token, process = content["token"], Process.parse(content["process"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return Holder(process, token) if process and isinstance(token, str) else None
