"""Fuzzes the readers of files.

    python -m tests.fuzz --seconds=600 [--only=NAME,...] [--seed=1]

prints, for every reader, how many damaged files it was handed, how many of them it refused in one
clear line, how many it accepted (found sound), and the findings: tracebacks, crashes, garbage that
was accepted, too much time or memory. Their files are kept. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import jax

from tests.fuzz.readers import READERS
from tests.fuzz.runner import Run

_SLICE = 60.0  # seconds of a process: long enough to be worth its start
_SHOWN = 5  # findings of a reader
_MEMORY = Path("/dev/shm")  # Linux keeps files there in memory, where damaging them costs no disk


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of all readers together")
    parser.add_argument("--only", default=",".join(READERS), help="readers, joined by commas")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="files of findings")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in READERS]:
        parser.error(f"--only={unknown[0]}: expected some of {', '.join(READERS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The processes use neither JAX's threads nor OpenCV's, which are not in them.
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore", message=r".*os\.fork\(\)")
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        # Each process would compile the same programs.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        runs = {
            name: Run(name, READERS[name], Path(folder) / name, arguments.seed) for name in names
        }
        with contextlib.suppress(KeyboardInterrupt):  # what was found until then counts
            _fuzz(runs, arguments.seconds)
        _print_table(runs, arguments.seed)
        _keep_findings(runs, arguments.keep, arguments.seed)
    return int(any(run.tally.findings for run in runs.values()))


def _fuzz(runs: dict[str, Run], seconds: float) -> None:
    end = time.monotonic() + seconds
    rounds = max(1, round(seconds / len(runs) / _SLICE))
    for turn in range(rounds):
        for position, run in enumerate(runs.values()):
            left = (rounds - turn) * len(runs) - position
            run.batch(max(0.1, (end - time.monotonic()) / left))


def _print_table(runs: dict[str, Run], seed: int) -> None:
    row = "{:16}{:>10}{:>10}{:>10}{:>10}"
    print(f"seed {seed}")
    print(row.format("reader", "inputs", "rejected", "accepted", "findings"))
    for name, run in runs.items():
        tally = run.tally
        counts = (tally.inputs, tally.rejected, tally.accepted, len(tally.findings))
        print(row.format(name, *(f"{count:,}" for count in counts)))


def _keep_findings(runs: dict[str, Run], keep: Path, seed: int) -> None:
    for name, run in runs.items():
        for finding in run.tally.findings[:_SHOWN]:
            path, content = run.input(finding.number)
            kept = keep / f"{name}-{seed}-{finding.number}-{path.name}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                kept.write_bytes(content)
            print(f"{kept if content is not None else f'{kept} (missing)'}: {finding.what}")


if __name__ == "__main__":
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
