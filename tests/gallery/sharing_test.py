"""kill -9 at any moment, and several processes at once: nobody twice, nobody missing."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import psutil
import pytest

from alignps_jax.gallery.claims import Claims, Owner
from alignps_jax.gallery.forgetting import forget_person
from alignps_jax.gallery.store import Gallery
from alignps_jax.types import UserError
from tests.gallery.finder import content, run
from tests.gallery.kills import FILES, kill_often, processes, write_files


@pytest.fixture(scope="module")
def context():
    return processes()


@pytest.fixture
def photos(tmp_path):
    return str(write_files(tmp_path / "photos"))


@pytest.fixture
def address(tmp_path):
    return str(tmp_path / "people.lance")


@pytest.fixture
def whole(tmp_path):
    return str(tmp_path / "whole.lance")


def test_kills_leave_nobody_twice_and_nobody_missing(address, whole, photos, context):
    kill_often(context, address, photos, kills=10, seed=5)
    run(address, photos)
    run(whole, photos)
    assert content(address) == content(whole)
    assert run(address, photos).known == FILES
    assert Claims(Gallery.open(address)).others() == []


def test_four_processes_share_the_work(address, whole, photos):
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawned) as pool:
        done = list(pool.map(partial(run, address, photos), [0.02] * 4))
    run(whole, photos)
    expected = content(whole)
    assert content(address) == expected
    scenes = len({row.rpartition("-")[0] for row in expected})
    assert sum(one.scenes for one in done) == scenes, "work was done twice"
    assert all(not one.skipped for one in done)


def test_nobody_is_forgotten_while_others_index(address, photos):
    run(address, photos)
    gallery = Gallery.open(address)
    parent = psutil.Process(os.getppid())
    other = Owner(socket.gethostname(), parent.pid, parent.create_time(), turn=0.5)
    claims = gallery.database.open_table("claims")
    owner = json.dumps(dataclasses.asdict(other))
    claims.add([{"bucket": "7", "owner": owner}])
    person = gallery.people(next(one.id for one in gallery.scenes(9) if gallery.people(one.id)))[0]
    with pytest.raises(UserError, match=rf"found process {parent.pid} on .* indexing"):
        forget_person(gallery, person.id)
    assert gallery.person(person.id) is not None
    # A process that is gone is nobody to wait for.
    claims.update(where="true", values={"owner": owner.replace(f"{parent.pid},", "999999999,")})
    forget_person(gallery, person.id)
