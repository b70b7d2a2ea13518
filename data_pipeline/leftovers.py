"""What preparations of a data set left behind when they were killed.

TFDS writes to `incomplete.<random>_<version>` and renames the folder at the end. Each such folder
names the process that writes it; it is removed once that process is certainly gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from alignps_jax.processes import Process

_MAKER = "prepared_by.json"
_MAX_BYTES = 4096


def sign(folder: Path) -> None:
    """Notes in a folder that this process writes it."""
    (folder / _MAKER).write_text(json.dumps(dataclasses.asdict(Process.this())))


def clear_leftovers(folder: Path) -> Iterator[str]:
    """Removes the unfinished folders of dead processes below `folder`, that of a data set.

    Yields:
      A line for each unfinished folder: removed, or why not.
    """
    for path in sorted(folder.glob("*/incomplete.*")):
        maker = _maker_of(path)
        if maker is None:
            yield f"{path}: unfinished, and does not say which process writes it; it stays"
        elif maker.is_running() is None:
            yield f"{path}: unfinished; whether {maker}, still writes it cannot be seen; it stays"
        elif maker.is_running():
            yield f"{path}: {maker}, is writing it"
        else:
            yield _removed(path, maker)


def _removed(path: Path, maker: Process) -> str:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # somebody else was faster
        pass
    except OSError as error:
        return f"{path}: left by {maker}, cannot be removed ({error.strerror or error})"
    with contextlib.suppress(OSError):  # something else is there
        path.parent.rmdir()
    return f"{path}: removed, {maker}, had left it unfinished"


def _maker_of(path: Path) -> Process | None:
    try:
        with (path / _MAKER).open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, _MAX_BYTES))
        return Process.parse(json.loads(content))
    except (OSError, ValueError, RecursionError):
        return None
