"""Kills indexing processes at random moments.

python -m tests.gallery.kills --kills=200 [--seed=1]

A process indexes a few photos and a video into a gallery, until kill -9 comes after some commits.
In the end the gallery must hold what an uninterrupted run leaves, row by row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gallery.finder import content, run
from tests.gallery.networks import photo, write_photos, write_video

FILES = 25


def processes() -> Any:
    """Processes that are forked from one that has imported everything: they start at once."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # LanceDB warns of every fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.gallery.finder"])
    return context


def write_files(folder: Path) -> Path:
    """Some photos and a video."""
    write_photos(folder, [f"{number % 3}/{number}.jpg" for number in range(FILES - 1)])
    write_video(folder / "video.avi", [photo(100 + number) for number in range(30)])
    return folder


def kill_often(context: Any, address: str, source: str, kills: int, seed: int) -> None:
    """Starts indexing, and kills it after some commits, so many times."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = context.Process(target=run, args=(address, source, 0.01))
        process.start()
        _watch(Path(address), process, rng.randrange(12))
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        # Few kills would come after the work is done; what is gone has to be found again.
        if rng.random() < 0.2:
            for path in rng.sample(sorted(Path(source).rglob("*.jpg")), FILES // 2):
                path.touch()


def _watch(address: Path, process: Any, commits: int) -> None:
    """Returns when the gallery has so many commits more, the process is gone, or it takes long."""
    deadline = time.monotonic() + 20
    versions = address / "people.lance" / "_versions"
    start = len(list(versions.glob("*")))
    while len(list(versions.glob("*"))) < start + commits and process.is_alive():
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gallery.kills", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    flags = parser.parse_args()
    print(f"seed {flags.seed}")
    with tempfile.TemporaryDirectory() as folder:
        source = str(write_files(Path(folder) / "photos"))
        address, whole = f"{folder}/people.lance", f"{folder}/whole.lance"
        kill_often(processes(), address, source, flags.kills, flags.seed)
        run(address, source)
        run(whole, source)
        found, expected = content(address), content(whole)
    print(f"{flags.kills} kills: {len(found)} rows, expected {len(expected)}")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
