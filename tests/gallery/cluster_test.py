"""Indexing on a Ray cluster of this machine: the same gallery, whoever is killed."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

import launch

pytest.importorskip("ray", reason="the extra cluster is missing: make setup")

from alignps_jax.errors import UserError
from alignps_jax.gallery.cluster import on_cluster
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import Indexed, index
from tests.gallery.finder import Finder, content, run
from tests.gallery.kills_test import FILES, write_files
from tests.gallery.networks import network_config, write_checkpoint, write_photos


def run_on_cluster(address: str, source: str, seconds: float = 0.0) -> Indexed:
    gallery = Gallery.open(address, Finder(), create=True)
    find = on_cluster("local", partial(Finder, seconds=seconds))
    return index(gallery, [source], every=0.4, find=find)


def workers() -> list[psutil.Process]:
    """The processes of this machine in which Ray finds people, below this one or its children."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if "Worker" in one.name() and "ray::" in one.name()]


@pytest.fixture
def photos(tmp_path):
    write_files(folder := tmp_path / "photos")
    (folder / "bad.jpg").write_bytes(b"no photo")
    return str(folder)


@pytest.fixture
def whole(tmp_path, photos):
    run(str(tmp_path / "whole.lance"), photos)
    return content(str(tmp_path / "whole.lance"))


def test_a_cluster_finds_whom_one_process_finds(tmp_path, photos, whole):
    address = str(tmp_path / "people.lance")
    done = run_on_cluster(address, photos)
    assert content(address) == whole
    assert done.done == FILES + 1
    assert [Path(path).name for path in done.walk.skipped] == ["bad.jpg"]
    assert run(address, photos).known == FILES


def test_a_worker_and_then_the_driver_are_killed(tmp_path, photos, whole):
    address = str(tmp_path / "people.lance")
    context = multiprocessing.get_context("spawn")
    driver = context.Process(target=run_on_cluster, args=(address, photos, 0.1))
    driver.start()
    end = time.monotonic() + 120
    while not (first := workers()) and time.monotonic() < end:
        time.sleep(0.05)
    first[0].kill()
    versions = Path(address, "people.lance", "_versions")
    while len(list(versions.glob("*"))) < 4 and driver.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL, "it was too fast to be killed"
    run_on_cluster(address, photos)
    assert content(address) == whole


def test_the_command_line(tmp_path, capsys):
    """Workers make the detector that is typed; a copy counts once."""
    checkpoint = write_checkpoint(tmp_path / "run", network_config())
    (path,) = write_photos(tmp_path / "photos", ["a.jpg"])
    for number in range(9):  # more than a task
        shutil.copy(path, path.with_stem(f"copy{number}"))
    words = f"--checkpoint={checkpoint} --gallery={tmp_path / 'g'} --source={path.parent}"
    assert launch.main(["", "--mode=index", "--cluster=local", *words.split()]) == 0
    assert " in 1 photos and frames" in capsys.readouterr().out


def test_no_cluster_is_a_line(tmp_path, photos):
    gallery = Gallery.open(tmp_path / "g", Finder(), create=True)
    with pytest.raises(UserError, match="--cluster=auto: found no Ray cluster"):
        index(gallery, [photos], find=on_cluster("auto", Finder))
