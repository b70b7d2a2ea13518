"""kill -9 at any moment: nobody twice, nobody missing.

KILLS=200 python -m pytest tests/gallery/kills_test.py
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time

from tests.gallery.finder import FILES, content, run, write_files


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
    address, whole = tmp_path / "people.lance", tmp_path / "whole.lance"
    source = write_files(tmp_path / "photos")
    rng = random.Random(seed := int(os.environ.get("SEED", 5)))
    for _ in range(int(os.environ.get("KILLS", 10))):
        process = context.Process(target=run, args=(str(address), source, 0.01))
        process.start()
        wait(address, process, rng.randrange(24))
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        # Few kills would come after the work is done; what is gone has to be found again.
        if rng.random() < 0.2:
            for path in rng.sample(sorted(tmp_path.glob("photos/*/*.jpg")), FILES // 2):
                path.touch()
    run(str(address), source)
    run(str(whole), source)
    assert content(str(address)) == content(str(whole)), f"seed {seed}"
    assert run(str(address), source).known == FILES
