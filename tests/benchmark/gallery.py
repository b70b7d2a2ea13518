"""How a gallery grows: adding, exact and indexed search, memory, disk.

The embeddings are simulated: ten of each identity around a direction of its own, as similar to one
another (cosines of about 0.6) as a trained network's are.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from jaxtyping import Float

from alignps_jax.experiments.benchmark import Row
from alignps_jax.gallery.entries import Scene, scene_id
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.people import FileState, FoundScene
from alignps_jax.types import Detections
from configs import cuhk
from tests.benchmark.measure import Context

DIM, PER_SCENE, PER_IDENTITY = 256, 5, 10
COMMIT, TIDY_COMMITS = 1024, 200  # scenes, as indexing commits them at most; then it tidies
SIMILARITY = 0.6  # of two embeddings of one identity
K, QUERIES = 10, 20


class Simulated:
    """Stands for the network that made simulated embeddings."""

    config = cuhk.get_config()
    fingerprint = "0" * 64
    name = "simulated, step 0"
    folder = None


def embeddings(first: int, count: int, turn: int) -> Float[np.ndarray, "N D"]:
    """Those of `count` identities from `first` on; another `turn` sees them again."""

    def directions(seed: int | tuple[int, int]) -> Float[np.ndarray, "N D"]:
        rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    own, noise = directions(first), directions((first, turn))
    mixed = np.sqrt(SIMILARITY) * own + np.sqrt(1 - SIMILARITY) * noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def block(number: int) -> list[FoundScene]:
    """The scenes of one commit: identities of its own, each in ten scenes."""
    identities = COMMIT * PER_SCENE // PER_IDENTITY
    turns = [embeddings(number, identities, turn) for turn in range(PER_IDENTITY)]
    people = np.concatenate(turns).reshape(COMMIT, PER_SCENE, DIM)
    scenes = []
    for row in range(COMMIT):
        path = f"/photos/{number:05}/{row:04}.jpg"
        content = f"{number:032}{row:032}"
        scene = Scene(scene_id(content, None), path, 1080, 1920, None, f"c{row % 6}", None, content)
        boxes = np.full((PER_SCENE, 4), row, np.float32) + np.arange(PER_SCENE)[:, None]
        scores = np.linspace(0.9, 0.3, PER_SCENE, dtype=np.float32)
        found = Detections(boxes, scores, people[row], np.ones(PER_SCENE, bool))
        scenes.append(FoundScene(scene, found))
    return scenes


def commit(gallery: Gallery, scenes: list[FoundScene]) -> None:
    """Stores photos, as indexing does."""
    files = [FileState(one.scene.path, 1, 1, one.scene.hash) for one in scenes]
    gallery.people.commit(scenes, files)


def rows(context: Context) -> Iterator[Row]:
    """A row per size; the gallery grows from one to the next."""
    with tempfile.TemporaryDirectory() as folder:
        address, blocks = Path(folder) / "people.lance", 0
        gallery = Gallery.open(address, Simulated(), create=True)
        for size in context.people:
            added, spent = blocks, 0.0
            while blocks * COMMIT * PER_SCENE < size:
                spent += seconds(partial(commit, gallery, block(blocks)))
                blocks += 1
                if blocks % TIDY_COMMITS == 0:  # as indexing does
                    spent += seconds(gallery.people.optimize)
            gallery.people.optimize()
            rate = (blocks - added) * COMMIT * PER_SCENE / spent
            yield {
                "what": f"{len(gallery.memory()):,} people",
                "added per s": rate,
                **search(gallery),
            }


def search(gallery: Gallery) -> Row:
    """Exact search, in memory or by a scan of the disk beyond that, and search by the index."""
    known = seconds(gallery.people.known_files)
    before, opened = psutil.Process().memory_info().rss, Gallery.open(gallery.address)
    load = seconds(opened.memory)
    exact, exact_time = timed(lambda query: {m.person.id for m in opened.search(query, K)})
    memory = psutil.Process().memory_info().rss - before
    for name in gallery.people.table.database.table_names():
        table = gallery.people.table.database.open_table(name)
        # What is tidied drops its older state after an hour.
        table.optimize(cleanup_older_than=datetime.timedelta(0), delete_unverified=True)
    disk = sum(path.stat().st_size for path in Path(gallery.address).rglob("*") if path.is_file())
    making = seconds(gallery.people.train)
    found, indexed_time = timed(lambda query: set(gallery.people.nearest(query, K)))
    with gallery.people.table.open() as table:
        table.drop_index("embedding_idx")
    return {
        "known files read, s": known,
        "disk, MB": disk / 1e6,
        "load, s": load,
        "memory, MB": memory / 1e6,
        "exact, ms": 1e3 * exact_time,
        "index made, s": making,
        "indexed, ms": 1e3 * indexed_time,
        "recall@10": statistics.mean(len(a & b) / K for a, b in zip(exact, found, strict=True)),
    }


def seconds(run: Callable[[], object]) -> float:
    """How long it takes once."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(search: Callable[[np.ndarray], set[str]]) -> tuple[list[set[str]], float]:
    """What each query finds, and the median time of a repeated query in seconds."""
    queries = embeddings(0, QUERIES, PER_IDENTITY)
    found = [search(query) for query in queries]
    return found, statistics.median(seconds(partial(search, query)) for query in queries)
