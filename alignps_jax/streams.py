"""Standard streams that go on where nobody reads them, and that can show every name of a file."""

import errno
import io
import os
from typing import Any, TextIO

# A pipe whose reader has left, a terminal that was closed.
_UNREAD = (errno.EPIPE, errno.EIO)


class _Stream(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _UNREAD:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def lasting(stream: TextIO) -> TextIO:
    """A standard stream that ends nothing: neither its reader nor an odd character can."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = io.BufferedWriter(_Stream(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
