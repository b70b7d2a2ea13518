"""Standard streams that go on where nobody reads them, and that can show every name of a file."""

import errno
import io
import os
import sys
from typing import Any


class _Stream(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # the reader or terminal has left
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def outlive_readers() -> None:
    """Makes standard output and error go on where nobody reads them, whatever is written there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            raw = io.BufferedWriter(_Stream(stream.fileno(), "w", closefd=False))
            words = stream.encoding, "backslashreplace"
            setattr(sys, name, io.TextIOWrapper(raw, *words, line_buffering=True))
