"""Starts of training that can be killed, each a process of its own without the cost of its imports.

The processes are forked from this one, which has imported all that `launch.py` needs but never
asked JAX for a device.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import alignps_jax.training.train  # noqa: F401  (its imports take most of the time of a start)
import launch


class Start:
    """One start of `launch.py`; its output is collected while it runs.

    Args:
      flags: the command line.
      file_bytes: the largest file that it may write (None: any), as a full disk would have it.
    """

    def __init__(self, flags: Sequence[str], file_bytes: int | None = None):
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            _run(flags, writing, file_bytes)
        os.close(writing)
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()
        self.exit_code: int | None = None

    def _read(self, reading: int) -> None:
        while chunk := os.read(reading, 1 << 16):
            self._chunks.append(chunk)
        os.close(reading)

    @property
    def output(self) -> str:
        return b"".join(self._chunks).decode(errors="replace")

    def is_over(self) -> bool:
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._reader.join()
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for the end, no longer than so, or `until`; returns whether it is over."""
        end = time.monotonic() + seconds
        while not self.is_over() and time.monotonic() < end and not until():
            time.sleep(0.002)
        return self.is_over()

    def send(self, number: int) -> float:
        """Sends a signal; returns the seconds until the end."""
        start = time.monotonic()
        if not self.is_over():
            os.kill(self.pid, number)
        while not self.wait(60):
            os.kill(self.pid, signal.SIGKILL)
        return time.monotonic() - start


def _run(flags: Sequence[str], writing: int, file_bytes: int | None) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        code = launch.main(["launch.py", *flags])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
