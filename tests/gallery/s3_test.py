"""A gallery in a bucket of moto's server (`pip install "moto[server]"` anywhere, on the PATH)."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

from pyarrow import fs

from alignps_jax.gallery import gallery as galleries
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.types import UserError
from tests.gallery.finder import Finder, content, run
from tests.gallery.networks import write_photos
from tests.places import free_port

MOTO = shutil.which("moto_server")
pytestmark = pytest.mark.skipif(MOTO is None, reason="no moto_server on the PATH: see this file")

NAMES = [f"{number}.jpg" for number in range(12)]


@pytest.fixture(scope="module")
def port():
    port = free_port()
    process = subprocess.Popen(
        [MOTO, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with process:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
        process.terminate()


@pytest.fixture
def bucket(port, monkeypatch):
    """Its files; LanceDB finds it by the environment."""
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in (
        ("AWS_ENDPOINT", endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    allowed = {"allow_bucket_creation": True, "allow_bucket_deletion": True}
    files = fs.S3FileSystem(endpoint_override=endpoint, **allowed)
    files.create_dir("people")
    yield files
    files.delete_dir("people")


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", NAMES)
    return str(tmp_path / "photos")


ADDRESS = "s3://people/people.lance"


def objects(bucket):
    selector = fs.FileSelector("people", recursive=True)
    found = [file.path for file in bucket.get_file_info(selector) if file.is_file]
    return [bucket.open_input_file(path).read() for path in found]


def test_it_holds_and_finds_whom_a_folder_does(bucket, photos, tmp_path, monkeypatch):
    folder = str(tmp_path / "people.lance")
    for address in (folder, ADDRESS):
        assert run(address, photos).scenes == len(NAMES)
        assert run(address, photos).known == len(NAMES)
    assert content(ADDRESS) == content(folder)
    query = np.eye(16, dtype=np.float32)[0]
    for fits in (True, False):  # in memory, and by LanceDB
        monkeypatch.setattr(galleries, "fits", lambda people, dim, fits=fits: fits)
        here, there = (Gallery.open(address).search(query, 10) for address in (folder, ADDRESS))
        assert [match.person.id for match in there] == [match.person.id for match in here]


def test_nothing_in_the_bucket_holds_who_was_forgotten(bucket, photos):
    run(ADDRESS, photos)
    gallery = Gallery.open(ADDRESS)
    person = gallery.search(np.eye(16)[0], 1)[0].person
    marks = Marks(gallery.people)
    marks.put([Mark("view", person.id, True, 0.5, "secret")])
    embedding = gallery.embeddings([person.id]).tobytes()
    assert any(embedding in found for found in objects(bucket))
    forget(gallery.people, persons=[person.id])
    assert not any(embedding in found or b"secret" in found for found in objects(bucket))
    assert marks.all() == []
    run(ADDRESS, photos)
    assert Gallery.open(ADDRESS).memory().person(person.id) is None


def test_what_the_store_answers_is_one_line(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"s3://nowhere/people\.lance: .*ucket"):
        Gallery.open("s3://nowhere/people.lance", Finder(), create=True)
    monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"--gallery: s3://people/people\.lance: .*onnect"):
        Gallery.open(ADDRESS)
