"""The TPU compiler's settings: a training step that compiles in less than half the time."""

from __future__ import annotations

import importlib.util
import mmap
import os
from pathlib import Path

VARIABLE = "LIBTPU_INIT_ARGS"
# XLA tries tilings of every convolution, and translates each to instructions to learn its cycles.
# With this target it takes the first that is good enough, instead of trying all of them.
FLAG = "xla_jf_convolution_performance_target"
_TARGET = 0.95


def stop_at_good_tilings() -> None:
    """Sets the target, for the TPUs of this process and of those that it starts.

    It must run before JAX looks for devices. Does nothing where the user has set the flag, where
    no TPU compiler is installed, or where it does not know the flag, which would end the process.
    """
    given = os.environ.get(VARIABLE, "")
    if FLAG not in given and _knows_flag():
        os.environ[VARIABLE] = f"{given} --{FLAG}={_TARGET}".strip()


def _knows_flag() -> bool:
    library = _library()
    if library is None:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return code.find(FLAG.encode()) >= 0


def _library() -> Path | None:
    """The library that JAX would load, if any."""
    spec = importlib.util.find_spec("libtpu")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    named = os.environ.get("TPU_LIBRARY_PATH", "")
    found = [Path(path) for path in (named, *(f"{folder}/libtpu.so" for folder in folders)) if path]
    # Where it cannot be read, JAX says so.
    usable = (path for path in found if path.is_file() and os.access(path, os.R_OK))
    return next((path for path in usable if path.stat().st_size), None)
