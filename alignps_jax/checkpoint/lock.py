"""One writer per folder, by a lock of the kernel's, which ends with its process."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from alignps_jax.distributed import is_main_process
from alignps_jax.types import UserError

NAME = ".lock"


@contextlib.contextmanager
def one_writer(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir`, which it makes; process 0 does so for all processes of a run.

    Raises UserError if another run writes there. A file system without locks is a note.
    """
    if not is_main_process():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / NAME).open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir}: found another run that writes there ({file.read(200).strip()}), "
                "expected none; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            print(f"note: {file.name}: {error.strerror}; only one run may write there at a time")
        file.truncate(0)
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {time.ctime()}"
        print(holder, file=file, flush=True)
        yield
