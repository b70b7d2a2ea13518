"""Seals of the programs that JAX keeps compiled: what is damaged there is compiled anew, not run.

JAX has a file for each program, which it writes in place and runs as it finds it. A process that is
killed meanwhile, a disk that is full or one that is failing leave something else there. So a list
beside these files has the hash of each one that was complete when it was written. It protects from
accidents; whoever can write to the folder can also write to the list.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jax._src.compilation_cache import decompress_executable  # the form of an entry is JAX's own

_LIST = "seals"
_ENTRY = "-cache"  # what the name of an entry ends with
# Seconds after which nobody is about to seal an entry any more.
_PATIENCE = 60.0


class Seals:
    """The seals of a folder of compiled programs; any thread may add some."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._sealed: set[str] = set()
        self._lock = threading.Lock()

    def drop_damaged(self, alone: bool) -> int:
        """Removes the entries whose seal is broken or missing; returns how many.

        Args:
          alone: no other process writes there. Else the newest entries may be without a seal.
        """
        seals, count = self._read(), 0
        for entry in self._entries():
            with contextlib.suppress(OSError):  # somebody else was faster, or may not remove it
                recent = time.time() - entry.stat().st_mtime < _PATIENCE
                if seals.get(entry.name) == _hash(Path(entry).read_bytes()):
                    self._sealed.add(entry.name)
                elif alone or entry.name in seals or not recent:
                    os.unlink(entry)
                    count += 1
        return count

    def add_new(self) -> None:
        """Seals the entries that were written since; those without room stay without."""
        with self._lock, contextlib.suppress(OSError):
            for entry in self._entries():
                if entry.name in self._sealed:
                    continue
                self._sealed.add(entry.name)
                content = Path(entry).read_bytes()
                if _is_complete(content):
                    with (self._folder / _LIST).open("ab", buffering=0) as file:
                        file.write(f"{_hash(content)} {entry.name}\n".encode())

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as found:
            yield from (entry for entry in found if entry.name.endswith(_ENTRY))

    def _read(self) -> dict[str, str]:
        """The hash of each entry that has a seal, the latest one; a torn line is none."""
        try:
            lines = (self._folder / _LIST).read_text(errors="replace").split("\n")[:-1]
        except OSError:
            return {}
        pairs = (line.partition(" ") for line in lines)
        return {name: hashed for hashed, _, name in pairs}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_complete(content: bytes) -> bool:
    """Whether all of an entry was written, for which the disk may have had no room."""
    try:
        decompress_executable(content)
    except Exception:  # what is raised depends on the library that compresses
        return False
    return True
