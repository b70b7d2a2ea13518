"""Training on real disks that give out: `python -m tests.soak.disks --rounds=9`, as root.

One process, or two of one run, write to a disk that gets full, and to one that the kernel makes
read-only after an error. All of them must end with an exit code and one line. With room again, the
same command must resume from a checkpoint, and its losses must be those of a run that nothing
disturbed. Prints a line per round; exit code 1 if anything was otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cluster import flags_of, start
from tests.soak.settings import compile_quickly
from tests.training.train_test import link_cache, losses

FLAGS = (
    "--config.train.duration=6 steps",
    "--config.train.checkpoint_every=1 steps",
    "--config.train.keep_checkpoints=9",
)
# Exit codes of a process that could not write, and of one that JAX ends with it.
EXIT_CODES = (2, -6)
PATIENCE = 900
_MIB = 1 << 20


def run(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(*words: object) -> Iterator[None]:
    """A file system that is mounted while the block runs; the last word is where."""
    run("mount", *words)
    try:
        yield
    finally:
        run("umount", words[-1])


class Full:
    """An ext4 file system at `place` with little room beside some ballast, which goes later."""

    def __init__(self, folder: Path, room: int):
        self.place, self.room = folder / "disk", room
        self.place.mkdir()
        self.image = folder / "image"

    def give_out(self) -> None:
        """Called when the run has its first checkpoint."""

    @contextlib.contextmanager
    def scarce(self) -> Iterator[None]:
        with self.image.open("wb") as file:
            file.truncate(64 * _MIB)
        run("mkfs.ext4", "-q", "-m", 0, self.image)
        with mounted("-o", "loop", self.image, self.place):
            free = os.statvfs(self.place)
            ballast = free.f_bavail * free.f_frsize - self.room
            run("fallocate", "-l", ballast, self.place / "ballast")
            yield

    @contextlib.contextmanager
    def ample(self) -> Iterator[None]:
        with mounted("-o", "loop", self.image, self.place):
            (self.place / "ballast").unlink()
            yield


class ReadOnly(Full):
    """An ext4 file system that the kernel makes read-only, as after an error of the disk."""

    @contextlib.contextmanager
    def scarce(self) -> Iterator[None]:
        self.room = 32 * _MIB
        with super().scarce():
            run("mount", "-o", "remount,errors=remount-ro", self.place)
            yield
        subprocess.run(["e2fsck", "-p", self.image], capture_output=True, check=False)

    def give_out(self) -> None:
        device = run("findmnt", "-n", "-o", "SOURCE", self.place)
        time.sleep(random.uniform(0, 2))
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("a test")


KINDS: dict[str, Callable[[Path, int], Disk]] = {
    "full": Full,
    "read-only": ReadOnly,
}


def outcome(shared: Path, workdir: Path, count: int, give_out: Callable[[], None]) -> list[str]:
    """What is wrong with how the processes of a run ended; empty: nothing, or it came through."""
    processes = begin(shared, workdir, count)
    begun = time.monotonic()
    while not any((workdir / "checkpoints").glob("[1-9]")):
        if processes[0].poll() is not None or time.monotonic() > begun + PATIENCE:
            break
        time.sleep(0.02)
    else:
        give_out()
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    found = []
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        print(f"    process {index}: {process.returncode}, {errors}", flush=True)
        wrong = process.returncode not in EXIT_CODES[:count] or (count == 1 and len(errors) != 1)
        if wrong and process.returncode != 0:
            found.append(f"process {index} ended with {process.returncode}: {output}")
    return found


def begin(shared: Path, workdir: Path, count: int) -> list[subprocess.Popen[str]]:
    joining = flags_of if count > 1 else lambda index, count, port: ([], {})
    return start(shared, workdir, *FLAGS, count=count, devices=1, joining=joining)


def one_round(kind: str, count: int, room: int, shared: Path, expected: dict) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        disk = KINDS[kind](Path(folder), room)
        workdir = disk.place / "run"
        with disk.scarce():
            link_cache(shared, workdir)
            found = outcome(shared, workdir, count, disk.give_out)
        with disk.ample():
            again = begin(shared, workdir, count)
            outputs = [process.communicate(timeout=PATIENCE)[0] for process in again]
            codes = [process.returncode for process in again]
            if any(codes):
                found.append(f"resuming ended with {codes}: {outputs}")
            elif (resumed := losses(workdir)) != expected:
                other = [step for step in expected if resumed.get(step) != expected[step]]
                found.append(f"resuming led to other losses of steps {other}: {outputs}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.disks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    random.seed(arguments.seed)
    kinds, counts = arguments.kinds.split(","), list(map(int, arguments.processes.split(",")))
    findings = 0
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        expected = {}
        for count in counts:
            workdir = shared / f"undisturbed{count}"
            link_cache(shared, workdir)
            for process in begin(shared, workdir, count):
                output = process.communicate(timeout=PATIENCE)[0]
                assert process.returncode == 0, output
            expected[count] = losses(workdir)
        size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
        for number in range(arguments.rounds):
            kind, count = kinds[number % len(kinds)], counts[number // len(kinds) % len(counts)]
            room = int(size * random.uniform(0.05, 0.95))
            print(f"{kind}, {count} processes, room for {room:,} bytes of {size:,}", flush=True)
            found = one_round(kind, count, room, shared, expected[count])
            for one in found:
                print(f"  FINDING: {one}", flush=True)
            findings += len(found)
    print(f"{arguments.rounds} rounds, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    compile_quickly()
    sys.exit(main())
