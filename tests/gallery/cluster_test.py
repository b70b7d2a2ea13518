"""Indexing on a Ray cluster of this machine: the same gallery, whoever is killed."""

import multiprocessing
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="the extra cluster is missing: make setup")

from alignps_jax.errors import UserError
from alignps_jax.gallery.cluster import detect_on_cluster
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import index
from tests.gallery.finder import FILES, Finder, content, run, write_files


def run_on_cluster(address, source, seconds=0.0, on="local"):
    gallery = Gallery.open(address, Finder(), create=True)
    detect = partial(detect_on_cluster, on, partial(Finder, seconds=seconds))
    return index(gallery, [source], every=0.4, detect=detect)


def workers():
    """The processes of this machine in which Ray finds people, below this one or its children."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if "Worker" in one.name() and "ray::" in one.name()]


def test_a_cluster_finds_whom_one_process_finds_whoever_is_killed(tmp_path):
    photos, address, alone = (str(tmp_path / name) for name in ("photos", "people", "whole"))
    write_files(Path(photos))
    Path(photos, "bad.jpg").write_bytes(b"no photo")
    context = multiprocessing.get_context("spawn")
    driver = context.Process(target=run_on_cluster, args=(address, photos, 0.1))
    driver.start()
    while driver.is_alive() and not workers():
        time.sleep(0.05)
    workers()[0].kill()
    versions = Path(address, "people.lance", "_versions")
    while driver.is_alive() and len(list(versions.glob("*"))) < 4:
        time.sleep(0.02)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL, "it was too fast to be killed"
    done = run_on_cluster(address, photos)
    assert [Path(path).name for path in done.walk.skipped] == ["bad.jpg"]
    assert run(alone, photos).done == FILES + 1 == done.known + done.done
    assert content(address) == content(alone)
    with pytest.raises(UserError, match="--cluster=auto: found no Ray cluster"):
        run_on_cluster(address, photos, on="auto")
