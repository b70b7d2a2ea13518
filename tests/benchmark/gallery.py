"""How a gallery grows: adding, exact and indexed search, memory, disk; and indexing of photos.

python -m tests.benchmark.gallery --people=10000,100000,1000000

The embeddings are simulated: ten of each identity around a direction of its own, as similar to one
another (cosines of about 0.6) as a trained network's are. Prints tables for docs/gallery.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import jax
import numpy as np
import psutil
from jaxtyping import Float
from ml_collections import ConfigDict

from alignps_jax.gallery.entries import FileState, Scene, scene_id
from alignps_jax.gallery.indexing import TIDY_COMMITS, index
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import IS_PERSON, IndexedScene
from alignps_jax.gallery.writing import commit_scenes, known_files, tidy
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.predict import inference_model
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Detections, Weights
from configs import cuhk, tiny
from data_pipeline.pipeline import single_image_batch

DIM = 256
PER_SCENE, PER_IDENTITY = 5, 10
COMMIT = 1024  # scenes, as indexing commits them at most
SIMILARITY = 0.6  # of two embeddings of one identity
K, QUERIES = 10, 20
SCANS = 5  # queries that are compared where each scans the disk


class Simulated:
    """Stands for the network that made simulated embeddings."""

    config = cuhk.get_config()
    fingerprint = "0" * 64
    name = "simulated, step 0"


def embeddings(first: int, count: int, turn: int, dim: int) -> Float[np.ndarray, "N D"]:
    """Those of `count` identities from `first` on; another `turn` sees them again."""
    centers = np.random.default_rng(first).normal(size=(count, dim)).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    noise = np.random.default_rng((first, turn)).normal(size=(count, dim)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = np.sqrt(SIMILARITY) * centers + np.sqrt(1 - SIMILARITY) * noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def block(number: int, dim: int = DIM) -> list[IndexedScene]:
    """The scenes of one commit: identities of its own, each in ten scenes."""
    identities = COMMIT * PER_SCENE // PER_IDENTITY
    people = np.concatenate(
        [embeddings(number, identities, turn, dim) for turn in range(PER_IDENTITY)]
    )
    scenes = []
    for row in range(COMMIT):
        path = f"/photos/{number:05}/{row:04}.jpg"
        scene = Scene(scene_id(path, None), path, 1080, 1920, None, f"c{row % 6}", None)
        found = Detections(
            np.full((PER_SCENE, 4), row, np.float32),
            np.linspace(0.9, 0.3, PER_SCENE, dtype=np.float32),
            people[row * PER_SCENE : (row + 1) * PER_SCENE],
            np.ones(PER_SCENE, bool),
        )
        scenes.append(IndexedScene(scene, FileState(1, 1, "0" * 64), found))
    return scenes


def growth(sizes: Sequence[int]) -> None:
    """Prints a row per size; the gallery grows from one to the next."""
    print(
        "| people | added per s | after that, a commit | known files read | disk, MB | load, s | "
        "memory, MB | exact, ms | index, s | indexed, ms | recall@10 |\n" + "|---:" * 11 + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        gallery = Gallery.open(
            Path(folder) / "people.lance", create_for=Simulated(), exact_up_to=sys.maxsize
        )  # no index for the search before it is measured
        blocks, spent = 0, 0.0
        for size in sizes:
            done = blocks
            while blocks * COMMIT * PER_SCENE < size:
                scenes = block(blocks)
                last = _seconds(functools.partial(commit_scenes, gallery, scenes))
                spent, blocks = spent + last, blocks + 1
                if blocks % TIDY_COMMITS == 0:  # as indexing does
                    spent += _seconds(functools.partial(tidy, gallery, make_indices=False))
            rate = (blocks - done) * COMMIT * PER_SCENE / spent
            spent = 0.0
            tidy(gallery)
            print(_row(gallery, Path(folder), rate, last), flush=True)


def _row(gallery: Gallery, folder: Path, rate: float, commit: float) -> str:
    known = _seconds(lambda: known_files(gallery))
    before = psutil.Process().memory_info().rss
    opened = Gallery.open(gallery.address)
    load = _seconds(opened.memory)
    queries = embeddings(0, QUERIES, PER_IDENTITY, DIM)
    if opened.memory() is None:
        queries = queries[:SCANS]
    search = functools.partial(_exactly, opened)
    exact = [search(query) for query in queries]
    exact_time = _median(search, queries)
    memory = psutil.Process().memory_info().rss - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all older states go
        gallery.table.optimize(cleanup_older_than=datetime.timedelta(0), delete_unverified=True)
    count, disk = gallery.num_people, _bytes(folder)
    indexed = Gallery.open(gallery.address, exact_up_to=0)
    building = _seconds(lambda: tidy(indexed))
    found = [indexed.search(query, K) for query in queries]
    indexed_time = _median(lambda query: indexed.search(query, K), queries)
    recall = statistics.mean(
        len(a & {m.person.id for m in b}) / K for a, b in zip(exact, found, strict=True)
    )
    indexed.table.checkout_latest()
    indexed.table.drop_index("embedding_idx")
    cells = [
        *(f"{count:,}", f"{rate:,.0f}", f"{commit:.2f} s", f"{known:.2f} s", f"{disk / 1e6:,.0f}"),
        *(f"{load:.1f}", f"{memory / 1e6:,.0f}", f"{1e3 * exact_time:.0f}"),
        *(f"{building:.0f}", f"{1e3 * indexed_time:.0f}", f"{recall:.3f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _exactly(gallery: Gallery, query: Float[np.ndarray, "D"]) -> set[str]:
    """The ids of the most similar people: in memory, or by a scan of the disk beyond that."""
    if gallery.memory() is not None:
        return {match.person.id for match in gallery.search(query, K)}
    search = gallery.table.search(query, vector_column_name="embedding").distance_type("cosine")
    found = search.bypass_vector_index().where(IS_PERSON).select(["id"]).limit(K).to_arrow()
    return set(found["id"].to_pylist())


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median(run: Callable[[np.ndarray], object], queries: Float[np.ndarray, "Q D"]) -> float:
    return statistics.median(_seconds(functools.partial(run, query)) for query in queries)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def random_detector(config: ConfigDict) -> Detector:
    """A network with random weights, which takes as long as a trained one."""
    model = inference_model(config)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype), weights_template(model)
    )
    return Detector(config, Weights(np.int32(0), weights.params, weights.frozen))


def write_photos(folder: Path, count: int, height: int, width: int) -> None:
    """JPEG files, each of its own, with the detail of a photo."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    for number in range(count):
        cv2.imwrite(str(folder / f"{number}.jpg"), np.roll(large, 7 * number, axis=1))


def throughput(photos: int) -> None:
    """Prints what indexing costs beside the network alone, in time and processor time.

    Both in turns, because this machine does other things as well.
    """
    detector = random_detector(cuhk.get_config())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder / "warm", detector.rows, 1080, 1920)
        gallery = Gallery.open(folder / "people.lance", create_for=detector)
        index(gallery, detector, [str(folder / "warm")])
        image = cv2.imread(str(folder / "warm" / "0.jpg"))
        batch = single_image_batch(image, detector.config.data)
        rows = detector.rows
        batch = jax.tree.map(lambda x: np.concatenate([x] * rows), batch)
        spent: dict[str, list[tuple[float, float]]] = {"network": [], "index": []}
        for turn in range(4):
            share = folder / str(turn)
            write_photos(share, photos // 4, 1080, 1920)
            for name, run in (
                ("network", functools.partial(_bare, detector, batch, photos // 4 // rows)),
                ("index", functools.partial(index, gallery, detector, [str(share)])),
            ):
                processor = time.process_time()
                seconds = _seconds(run)
                spent[name].append((seconds, time.process_time() - processor))
    (bare, bare_cpu), (whole, whole_cpu) = (map(sum, zip(*spent[n], strict=True)) for n in spent)
    count = photos // 4 * 4
    print(
        "\n| photos of 1920x1080 | network alone, s | indexing, s | rate | processor time |\n"
        "|---:|---:|---:|---:|---:|\n"
        f"| {count} | {bare:.1f} | {whole:.1f} | {bare / whole:.1%} | {bare_cpu:.1f} s and "
        f"{whole_cpu:.1f} s: {bare_cpu / whole_cpu:.1%} |",
        flush=True,
    )


def _bare(detector: Detector, batch: object, count: int) -> None:
    for _ in range(count):
        jax.block_until_ready(detector.detect_batch(batch))


def memory(counts: Sequence[int]) -> None:
    """Prints the most memory that indexing takes, in a process of its own per number of photos."""
    print("\n| small photos | damaged | photos per s | most memory, MB | again, all known |")
    print("|---:|---:|---:|---:|---:|")
    for count in counts:
        words = [sys.executable, "-m", "tests.benchmark.gallery", f"--index={count}"]
        print(subprocess.run(words, capture_output=True, text=True, check=True).stdout, end="")


def index_small(count: int) -> None:
    """Prints a row of `memory`."""
    config = tiny.get_config()
    config.eval.max_detections = PER_SCENE
    detector = random_detector(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder / "photos", count, 240, 320)
        gallery = Gallery.open(folder / "people.lance", create_for=detector)
        for number in range(0, count, 100):
            path = folder / "photos" / f"{number}.jpg"
            path.write_bytes(path.read_bytes()[:-1000])
        start = time.perf_counter()
        skipped = len(index(gallery, detector, [str(folder / "photos")]).skipped)
        seconds = time.perf_counter() - start
        again = _seconds(lambda: index(gallery, detector, [str(folder / "photos")]))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"| {count:,} | {skipped:,} | {count / seconds:.0f} | {most:,.0f} | {again:.2f} s |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.gallery", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--people", default="10000,100000,1000000", help="sizes, ascending")
    parser.add_argument("--photos", type=int, default=40, help="to index with the full network")
    parser.add_argument("--small", default="100,10000", help="numbers of small photos to index")
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.index:
        index_small(flags.index)
        return
    if flags.people:
        growth([int(size) for size in flags.people.split(",")])
    if flags.photos:
        throughput(flags.photos)
    if flags.small:
        memory([int(count) for count in flags.small.split(",")])


if __name__ == "__main__":
    main()
