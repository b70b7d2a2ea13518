"""kill -9 at any moment, and several processes at once: nobody twice, nobody missing."""

from __future__ import annotations

import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from alignps_jax.gallery.claims import Claims
from alignps_jax.gallery.store import Gallery
from tests.gallery.finder import content, run
from tests.gallery.networks import photo, write_photos, write_video

KILLS = 12


@pytest.fixture(scope="module")
def processes():
    """Forked from a server that has imported everything: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.gallery.finder"])
    return context


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, [f"{number % 3}/{number}.jpg" for number in range(24)])
    write_video(folder / "video.avi", [photo(100 + number) for number in range(30)])
    return folder


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    address = str(tmp_path_factory.mktemp("whole") / "people.lance")
    assert not run(address, str(photos)).skipped
    return content(address)


def watch(address, processes, commits):
    """Returns when the gallery has so many commits more, or no process is there any more."""
    versions = Path(address, "people.lance", "_versions")
    start = len(list(versions.glob("*")))
    while len(list(versions.glob("*"))) < start + commits and any(p.is_alive() for p in processes):
        time.sleep(0.002)


def test_kills_leave_nobody_twice_and_nobody_missing(tmp_path, processes, photos, expected):
    address, source = str(tmp_path / "people.lance"), str(photos)
    rng = random.Random(5)
    for _ in range(KILLS):
        together = [
            processes.Process(target=run, args=(address, source, 0.01))
            for _ in range(rng.choice((1, 1, 2)))
        ]
        for one in together:
            one.start()
        watch(address, together, rng.randrange(12))
        for one in together:
            one.join(rng.uniform(0, 0.02))
            one.kill()
            one.join()
    run(address, source)
    assert content(address) == expected
    assert run(address, source).known == 25
    assert Claims(Gallery.open(address)).others() == []


def test_four_processes_share_the_work(tmp_path, processes, photos, expected):
    address, source = str(tmp_path / "people.lance"), str(photos)
    with ProcessPoolExecutor(4, mp_context=processes) as pool:
        done = list(pool.map(partial(run, address, source), [0.02] * 4))
    assert content(address) == expected
    scenes = len({row.rpartition("-")[0] for row in expected})
    assert sum(one.scenes for one in done) >= scenes
    assert all(not one.skipped for one in done)
