"""Kills training runs at random moments, and checks what resumes.

    python -m tests.soak --kills=200 [--seed=1] [--keep=runs/soak]

Training on a few tiny scenes gets kill -9 while it prepares data, trains, saves, evaluates or
writes its results; now and then SIGTERM or Ctrl-C, a second run on the same workdir, and a disk
without room. Every run that comes to its end must have the log, metrics, detections and checkpoints
of an uninterrupted one. Prints a table, and keeps the folders of findings. Exit code 1 if there are
any.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.settings import compile_quickly


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=200, help="how many starts to kill")
    parser.add_argument("--stops", type=int, help="SIGTERM and Ctrl-C; default: a tenth of that")
    parser.add_argument("--full", type=int, help="disks without room; default: a tenth")
    parser.add_argument("--second", type=int, help="second runs; default: a twentieth")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--keep", type=Path, default=Path("runs/soak"), help="folders of findings")
    arguments = parser.parse_args()
    kills, shares = arguments.kills, (arguments.stops, arguments.full, arguments.second)
    stops, full, second = (
        kills // part if share is None else share
        for share, part in zip(shares, (10, 10, 20), strict=True)
    )
    # Imported here: --help needs none of it.
    from tests.soak.soak import Soak, print_table, run_soak

    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.seed)
        print(f"seed {arguments.seed}")
        try:
            run_soak(soak, kills, stops, full, second)
        finally:
            print_table(soak)
        for finding in soak.findings:
            name = finding.split(":")[0]
            kept = arguments.keep / f"{arguments.seed}-{Path(name).name}"
            shutil.copytree(name, kept, symlinks=True, ignore_dangling_symlinks=True)
            print(f"{kept}{finding.removeprefix(name)}")
    return int(bool(soak.findings))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    compile_quickly()
    sys.exit(main())
