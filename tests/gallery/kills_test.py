"""kill -9 at any moment: nobody twice, nobody missing.

KILLS=200 python -m pytest tests/gallery/kills_test.py
"""

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.people import People
from tests.gallery.finder import FILES, content, run, write_files


def test_kills_leave_nobody_twice_and_nobody_missing(tmp_path, monkeypatch):
    """In the end the gallery holds what an uninterrupted run leaves, row by row."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # LanceDB warns of every fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.gallery.finder"])  # processes start at once
    address, whole, copy = (str(tmp_path / name) for name in ("people.lance", "whole", "copy"))
    source, versions = write_files(tmp_path / "photos"), Path(address, "files.lance", "_versions")
    rng = random.Random(seed := int(os.environ.get("SEED", 5)))
    for _ in range(int(os.environ.get("KILLS", 10))):
        process = context.Process(target=run, args=(address, source, 0.01))
        process.start()
        commits = len(list(versions.glob("*"))) + rng.randrange(24)
        while process.is_alive() and len(list(versions.glob("*"))) < commits:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        # Few kills would come after the work is done; what is gone has to be found again.
        if rng.random() < 0.2:
            for path in rng.sample(sorted(tmp_path.glob("photos/*/*.jpg")), FILES // 2):
                path.touch()
        # Whatever a kill leaves can be forgotten.
        people = People(shutil.copytree(address, copy))
        forget(people, [*people.known_files()])
        assert people.table.count() == people.scenes.count() == 0
        shutil.rmtree(copy)
    run(address, source)
    run(whole, source)
    assert content(address) == content(whole), f"seed {seed}"
    assert run(address, source).known == FILES
