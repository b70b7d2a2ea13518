"""Indexes whatever is added to folders: `--watch`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import watchfiles

from alignps_jax.errors import IncompleteError

# Files that are still being copied are left alone until nothing changes for so long.
_QUIET, _LONGEST = 2000, 60_000  # ms


def watch(
    run: Callable[[], object], sources: Sequence[str], stop: threading.Event | None = None
) -> None:
    """Runs `run` now, and again whenever something below the sources changes, until `stop`.

    If `run` raises IncompleteError, that is printed.
    """
    # The first turn comes without a change: it is watched before it is looked at.
    wait: Any = {"step": _QUIET, "debounce": _LONGEST, "rust_timeout": _QUIET // 2}
    turns = watchfiles.watch(*sources, **wait, yield_on_timeout=True, stop_event=stop)
    for number, changes in enumerate(turns):
        if changes or number == 0:
            try:
                run()
            except IncompleteError as error:
                print(f"note: {error}")
