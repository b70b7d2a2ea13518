"""The save that Orbax has under way: what it logs of it, and how it ends."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import orbax.checkpoint as ocp

from alignps_jax.checkpoint.arrays import system_reason
from alignps_jax.distributed import is_multiprocess

_POLL = 0.1  # seconds


class OrbaxLog(logging.Filter):
    """A filter that drops what Orbax logs below errors, and what it raises besides.

    Attributes:
      error: the latest of what it raises besides that is about a disk.
    """

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in Path(record.pathname).parts:
            return True
        raised = record.exc_info[1] if record.exc_info else None
        if raised is not None and system_reason(raised) is not None:
            self.error = raised
        return record.levelno >= logging.ERROR and not record.exc_info


def wait_until_saved(manager: ocp.CheckpointManager, log: OrbaxLog) -> None:
    """Returns when no save is under way; raises what went wrong with the last one.

    With several processes, one that could not write waits inside Orbax for those that could, which
    wait for it. So it raises as soon as Orbax has logged that; the others end with it.
    """
    if not is_multiprocess():
        return manager.wait_until_finished()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            manager.wait_until_finished()
        except BaseException as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive() and log.error is None:
        waiting.join(_POLL)
    if log.error is not None:
        raise log.error
    if raised:
        raise raised[0]
    return None
