"""Indexes whatever is added to folders: `--watch`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import watchfiles

from alignps_jax.errors import IncompleteError

# Files that are still being copied are left alone until nothing changes for so long.
_QUIET, _LONGEST = 2000, 60_000  # ms


def watch(
    run: Callable[[], object], sources: Sequence[str], stop: threading.Event | None = None
) -> None:
    """Runs `run` now, and again whenever something below the sources changes.

    Args:
      run: indexes them; if it raises IncompleteError, that is printed.
      sources: folders, photos or videos.
      stop: ends it; None: for ever.
    """
    # The first turn comes without a change: it is watched before it is looked at.
    turns = watchfiles.watch(
        *sources,
        step=_QUIET,
        debounce=_LONGEST,
        rust_timeout=_QUIET // 2,
        yield_on_timeout=True,
        stop_event=stop,
    )
    for number, changes in enumerate(turns):
        if changes or number == 0:
            try:
                run()
            except IncompleteError as error:
                print(f"note: {error}")
