"""Output that nobody reads any more: its process goes on."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

# A pipe whose reader quit, such as `| head` or `2>&1 | tee`, and a terminal that was closed.
_NO_READER = (errno.EPIPE, errno.EIO)


class Unbreakable(io.TextIOWrapper):
    """A text stream that writes to nowhere once it has no reader."""

    def write(self, text: str) -> int:
        with self._without_reader():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            super().flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_READER:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Makes `sys.stdout` and `sys.stderr` unbreakable; names of files need not be text there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            words = stream.encoding, "backslashreplace", None, stream.line_buffering
            setattr(sys, name, Unbreakable(stream.detach(), *words))
