"""Progress of loops: a bar on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

# Between two lines where nobody watches: a log of hours stays readable.
SECONDS_PER_LINE = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
# What tqdm writes to draw a bar over the one before it.
_CURSOR = re.compile(r"\x1b\[A|[\r\n]")


class _Lines:
    """A stream that gets every state of a bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = _CURSOR.sub("", text).strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    disable: bool = False,
    stream: TextIO | None = None,
    seconds: float = SECONDS_PER_LINE,
) -> tqdm:
    """tqdm, on stderr or `stream`, which also fits log files.

    On a terminal it is the usual bar. Elsewhere it writes a line every so many `seconds`, and one
    at the end of a loop that took longer and shall `leave` one; shorter loops write nothing.

    Args:
      iterable: what to go through, if it is not `update` that counts.
      desc: what is done.
      unit: what is counted.
      total: how many there are; default: the length of `iterable`.
      initial: how many are done already.
      leave: whether the end stays to be seen.
      disable: show nothing.
      stream: where to write.
      seconds: between two lines.
    """
    stream = stream or sys.stderr
    common: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial}
    common["leave"] = leave
    if stream.isatty():
        return tqdm(iterable, file=stream, dynamic_ncols=True, disable=disable, **common)
    lines: Any = _Lines(stream)
    return tqdm(
        iterable,
        file=lines,
        bar_format=_LINE,
        delay=seconds,
        mininterval=seconds,
        maxinterval=seconds,
        miniters=1,
        disable=disable,
        **common,
    )
