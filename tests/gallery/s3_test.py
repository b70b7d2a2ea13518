"""A gallery in a bucket of moto's server (`pip install "moto[server]"` anywhere, on the PATH)."""

import shutil
import socket
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from pyarrow import fs

from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.tables import Note
from tests.gallery.finder import content, run
from tests.gallery.networks import write_photos
from tests.places import free_port

MOTO = shutil.which("moto_server")
pytestmark = pytest.mark.skipif(MOTO is None, reason="no moto_server on the PATH: see this file")

ADDRESS = "s3://people/people.lance"


@pytest.fixture
def bucket(monkeypatch):
    """Its files; LanceDB finds it by the environment."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([MOTO, f"--port={port}"], **quiet) as process, socket.socket() as probe:
        for _ in range(300):
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
            time.sleep(0.1)
        files = fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True)
        files.create_dir("people")
        yield files
        process.terminate()


def objects(bucket):
    selector = fs.FileSelector("people", recursive=True)
    found = [file.path for file in bucket.get_file_info(selector) if file.is_file]
    return b"\n".join(bucket.open_input_file(path).read() for path in found)


def test_it_is_what_a_folder_is(bucket, tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", [f"{number}.jpg" for number in range(12)])
    folder, photos, query = str(tmp_path / "g"), str(tmp_path / "photos"), np.eye(16)[0]
    for address in (folder, ADDRESS):
        assert run(address, photos).scenes == run(address, photos).known == 12
    assert content(ADDRESS) == content(folder)
    for is_on_disk in (False, True):  # by LanceDB, or in memory
        if is_on_disk:
            monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
        here, there = (Gallery.open(address).search(query, 10) for address in (folder, ADDRESS))
        assert [match.person.id for match in there] == [match.person.id for match in here]
    gallery, person = Gallery.open(ADDRESS), here[0].person
    marks = gallery.people.notes("marks")
    marks.put([Note("mark", (person.id,), {"path": "secret"})])
    embedding = gallery.embeddings([person.id]).tobytes()
    assert embedding in objects(bucket)
    forget(gallery.people, persons=[person.id])
    assert embedding not in objects(bucket)
    assert b"secret" not in objects(bucket)
    assert marks.all() == []
    run(ADDRESS, photos)
    assert gallery.person(person.id) is None
