"""Large memory pages for large arrays, on Linux."""

from __future__ import annotations

import os
import platform
import sys

SETTINGS = "GLIBC_TUNABLES"


def restart_with_large_pages() -> None:
    """Starts this program once more, in the same process, with large pages switched on.

    XLA asks for the memory of a step anew in every step, and Linux clears it page by page, which
    on CPUs takes a while. The C library reads its settings only when a program starts. Does nothing
    where there are settings already, or another C library.
    """
    if SETTINGS in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ[SETTINGS] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
