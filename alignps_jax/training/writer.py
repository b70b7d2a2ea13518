"""The one writer of a run's workdir, where the run has several processes too."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from alignps_jax import peers
from alignps_jax.checkpoint.lock import WorkdirLock
from alignps_jax.types import UserError

# By this file in the shared workdir the processes of a run tell one another of a signal.
_NOTICE = "stop.signal"


@dataclasses.dataclass(frozen=True)
class Writer:
    """A run's right to write its workdir.

    `release` gives it up, from any thread. `several` says whether the run has several processes.
    """

    workdir: Path
    release: Callable[[], None]
    several: bool

    def notice(self, number: int) -> None:
        """Tells the run's other processes that this one got a signal."""
        if self.several:
            # They get the signal themselves, or end with this process; this makes it quicker.
            with contextlib.suppress(OSError):
                (self.workdir / _NOTICE).write_text(str(int(number)))

    def noticed_elsewhere(self) -> int:
        """The signal that another process of the run got; 0 for none."""
        try:
            found = (self.workdir / _NOTICE).read_bytes()
        except OSError:
            return 0
        return int(found) if found in (b"2", b"15") else 0


@contextlib.contextmanager
def one_writer(workdir: Path) -> Iterator[Writer]:
    """Holds the lock of `workdir`: process 0 of a run does, for all of them.

    A run of one process is refused before JAX looks for devices, which the other run may hold.

    Raises:
      UserError: another run writes there, in every process of this one.
    """
    lock, refusal = WorkdirLock(workdir), None
    several = peers.several()
    if peers.leads():
        try:
            lock.acquire()
            (workdir / _NOTICE).unlink(missing_ok=True)
        except UserError as error:
            refusal = error
    if peers.agree(lambda: refusal is not None) and refusal is None:
        raise UserError(f"{workdir}: process 0 may not write there, for the reason it gives")
    if refusal is not None:
        raise refusal
    try:
        yield Writer(workdir, lock.release, several)
    finally:
        lock.release()
