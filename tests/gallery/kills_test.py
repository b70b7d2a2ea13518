"""The same gallery wherever it lies and whoever is killed: alone, on a Ray cluster, in a bucket.

KILLS=200 python -m pytest tests/gallery/kills_test.py
"""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from pyarrow import fs

from alignps_jax.gallery import index as indexing
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import find_people, index
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.gallery.people import People
from tests.gallery.painted import Finder, write_photos
from tests.media.clips import write_clip
from tests.places import free_port

FILES = 25
MOTO = shutil.which("moto_server")  # pip install "moto[server]" anywhere, on the PATH
BUCKET = "s3://people/people.lance"
indexing.COMMIT_SECONDS = 0.05


def run(address, source, seconds=0.0, cluster=""):
    """Indexes a folder, committing all the time."""
    gallery, find = Gallery.open(address, Finder(seconds), create=True), find_people
    if cluster:
        from alignps_jax.gallery.cluster import on_cluster

        find = on_cluster(cluster, partial(Finder, seconds))
    return index(gallery, [source], every=0.4, find=find)


def content(address):
    """All of a gallery: the row of each key, whenever its file was touched."""
    people = People(address)
    tables = [table.rows().to_pylist() for table in (people.table, people.scenes, people.files)]
    rows = {row.get("id") or row["path"]: row | {"mtime": 0} for table in tables for row in table}
    assert len(rows) == sum(map(len, tables)), "somebody is there twice"
    return rows


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with photos, one of them damaged, and a video; what a run leaves of it."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, [f"{number % 3}/{number}.jpg" for number in range(FILES - 1)])
    write_clip(folder / "video.mp4", [number / 5 for number in range(30)])
    (folder / "bad.jpg").write_bytes(b"no photo")
    address = str(tmp_path_factory.mktemp("whole") / "people.lance")
    assert run(address, str(folder)).done == FILES + 1
    return str(folder), content(address)


def test_one_process(tmp_path, library):
    source, whole = library
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # processes start at once
    address = str(tmp_path / "people.lance")
    versions, photos = Path(address, "files.lance", "_versions"), Path(source).glob("*/*.jpg")
    rng, photos = random.Random(seed := int(os.environ.get("SEED", 5))), sorted(photos)
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
            for path in rng.sample(photos, FILES // 2):
                path.touch()
    run(address, source)
    assert content(address) == whole, f"seed {seed}"
    assert run(address, source).known == FILES


def workers():
    """The processes of this machine in which Ray finds people, below this one or its children."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if "Worker" in one.name() and "ray::" in one.name()]


def test_a_cluster(tmp_path, library):
    source, whole = library
    pytest.importorskip("ray", reason="the extra cluster is missing: make setup")
    address, context = str(tmp_path / "people.lance"), multiprocessing.get_context("spawn")
    driver = context.Process(target=run, args=(address, source, 0.1, "local"))
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
    done = run(address, source, cluster="local")
    assert done.known + done.done == FILES + 1
    assert [Path(path).name for path in done.walk.skipped] == ["bad.jpg"]
    assert content(address) == whole


@pytest.fixture
def bucket(monkeypatch):
    """All that lies in it; LanceDB finds it by the environment."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([MOTO, f"--port={port}"], **quiet) as process, socket.socket() as probe:
        while process.poll() is None and probe.connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        files = fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True)
        files.create_dir("people")
        listed = partial(files.get_file_info, fs.FileSelector("people", recursive=True))
        yield lambda: b"".join(files.open_input_file(x.path).read() for x in listed() if x.is_file)
        process.terminate()


@pytest.mark.skipif(MOTO is None, reason="no moto_server on the PATH: see above")
def test_a_bucket(bucket, library):
    source, whole = library
    run(BUCKET, source)
    assert content(BUCKET) == whole
    gallery = Gallery.open(BUCKET)
    person = next(name for name in whole if gallery.memory().person(name))
    embedding, marks = gallery.embeddings([person]), Marks(gallery.people)
    ((match,),) = gallery.search_many(embedding, 1)
    assert match.person.id == person
    marks.put([Mark("view", person, True, 0.5, "secret")])
    assert all(found in bucket() for found in (embedding.tobytes(), b"secret"))
    forget(gallery.people, persons=[person])
    assert not any(found in bucket() for found in (embedding.tobytes(), b"secret"))
    assert marks.all() == []
    assert run(BUCKET, source).known == FILES
    assert gallery.memory().person(person) is None
