"""Settings of the memory allocator, on Linux: large pages, and memory that is kept for reuse."""

from __future__ import annotations

import os
import platform
import sys

VARIABLE = "GLIBC_TUNABLES"
_LARGE_PAGES = "glibc.malloc.hugetlb=1"
# Arrays up to 1 GiB come from memory that is kept, up to 256 MiB of it beyond the last one in use.
_KEEP = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=268435456"
# Older versions refuse such a threshold, and then ask the system for every array.
_KEEPS_SINCE = (2, 36)


def settings() -> str:
    """The value of `VARIABLE` that suits this machine; "" where another C library is."""
    library, version = platform.libc_ver()
    if library != "glibc":
        return ""
    keeps = tuple(map(int, version.split(".")[:2])) >= _KEEPS_SINCE
    return f"{_LARGE_PAGES}:{_KEEP}" if keeps else _LARGE_PAGES


def restart_with_settings() -> None:
    """Starts this program once more, in the same process, with these settings.

    XLA asks for the memory of a step anew in every step, and Linux clears it page by page, which
    on CPUs takes a while. The C library reads its settings only when a program starts. Does nothing
    where there are settings already, or another C library.
    """
    if VARIABLE in os.environ or not settings():
        return
    os.environ[VARIABLE] = settings()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    print(settings())
