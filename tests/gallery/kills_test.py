"""kill -9 at any moment: nobody twice, nobody missing.

KILLS=200 python -m pytest tests/gallery/kills_test.py
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time

from tests.gallery.finder import content, run
from tests.gallery.networks import photo, write_photos, write_video

FILES = 25


def write_files(folder):
    """Some photos and a video."""
    write_photos(folder, [f"{number % 3}/{number}.jpg" for number in range(FILES - 1)])
    write_video(folder / "video.avi", [photo(100 + number) for number in range(30)])


def wait(address, process, commits):
    """Until the gallery has so many commits more, the process is gone, or it takes long."""
    deadline = time.monotonic() + 20
    versions = address / "files.lance" / "_versions"
    start = len(list(versions.glob("*")))
    while len(list(versions.glob("*"))) < start + commits and process.is_alive():
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)


def test_kills_leave_nobody_twice_and_nobody_missing(tmp_path, monkeypatch):
    """In the end the gallery holds what an uninterrupted run leaves, row by row."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # LanceDB warns of every fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.gallery.finder"])  # processes start at once
    address, source = tmp_path / "people.lance", tmp_path / "photos"
    write_files(source)
    rng = random.Random(seed := int(os.environ.get("SEED", 5)))
    for _ in range(int(os.environ.get("KILLS", 10))):
        process = context.Process(target=run, args=(str(address), str(source), 0.01))
        process.start()
        wait(address, process, rng.randrange(24))
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        # Few kills would come after the work is done; what is gone has to be found again.
        if rng.random() < 0.2:
            for path in rng.sample(sorted(source.rglob("*.jpg")), FILES // 2):
                path.touch()
    run(str(address), str(source))
    run(whole := str(tmp_path / "whole.lance"), str(source))
    assert content(str(address)) == content(whole), f"seed {seed}"
    assert run(str(address), str(source)).known == FILES
