"""The published figures from detections: simulated evaluations of the data sets' real sizes."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

from alignps_jax.evaluation.metrics import detection_metrics, search_metrics
from alignps_jax.experiments.benchmark.measure import time_in_turns
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol
from data_pipeline.sources.source import Queries, all_but, search_everywhere
from tests.benchmark.measure import Context, Row

DIM = 256
THRESHOLD = 0.2


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Size of an evaluation: people are detected once each, and as often again below threshold.

    `appearances` are the images that show one identity, of which the first is the query's.
    """

    images: int
    people: int
    queries: int
    identities: int
    appearances: int


CUHK_SYSU = Simulation(images=6978, people=25000, queries=2900, identities=2900, appearances=3)
PRW = Simulation(images=6112, people=25000, queries=2057, identities=450, appearances=40)
QUICK = Simulation(images=60, people=200, queries=20, identities=20, appearances=3)


def rows(context: Context) -> Iterator[Row]:
    """Detection and search figures of CUHK-SYSU with gallery size 100, and of PRW."""
    cuhk, prw = (QUICK, QUICK) if context.quick else (CUHK_SYSU, PRW)
    people = simulate_people(cuhk)
    protocol = with_gallery_size(people, cuhk, min(100, cuhk.images // 2))
    yield _row(context, "CUHK-SYSU, TestG100", people, protocol, "< 2 s")
    people = simulate_people(prw)
    yield _row(context, "PRW", people, in_all_images(people, prw), "< 5 s")


def _row(
    context: Context, name: str, people: Annotations, protocol: SearchProtocol, goal: str
) -> Row:
    detections = simulate_detections(people)

    def evaluate() -> tuple[object, ...]:
        return (
            detection_metrics(people, detections, score_threshold=THRESHOLD),
            search_metrics(protocol, detections, score_threshold=THRESHOLD),
        )

    time = time_in_turns({"evaluate": evaluate}, runs=context.runs)["evaluate"]
    above = np.count_nonzero(detections.scores >= THRESHOLD)
    detections_size = detections.embeddings.nbytes + detections.boxes.nbytes
    return Row(
        "evaluate",
        f"all figures of {name}",
        time,
        goal=goal,
        memory=detections_size + peak_of(evaluate),
        note=f"{len(protocol.query_image):,} queries, {len(people.names):,} images, {above:,} "
        f"detections; they themselves take {detections_size / 1e6:.0f} MB",
    )


def simulate_people(size: Simulation) -> Annotations:
    """People side by side on the images; some of them are the identities' appearances."""
    rng = np.random.default_rng(0)
    # Everybody's image: all images get someone.
    image = np.concatenate(
        [np.arange(size.images), rng.integers(0, size.images, size.people - size.images)]
    )
    image.sort()
    starts = np.searchsorted(image, np.arange(size.images + 1))
    place = np.arange(size.people) - starts[image]
    corner = np.stack([70.0 * place, rng.uniform(0, 300, size.people)], axis=1)
    boxes = np.concatenate([corner, corner + rng.uniform((40, 90), (60, 200), corner.shape)], 1)
    identity = np.full(size.people, -1, np.int32)
    chosen = rng.permutation(size.people)[: size.identities * size.appearances]
    identity[chosen] = np.repeat(np.arange(size.identities), size.appearances)

    def per_image(values: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.split(values, starts[1:-1]))

    return Annotations(
        names=tuple(f"{number}.jpg" for number in range(size.images)),
        boxes=per_image(boxes.astype(np.float32)),
        identity=per_image(identity),
        labeled=per_image(identity >= 0),
        camera=np.zeros(size.images, np.int32),
    )


def simulate_detections(people: Annotations) -> GalleryDetections:
    """Everybody, a little off and above the threshold, and as many others below it."""
    rng = np.random.default_rng(1)
    counts = np.array([len(boxes) for boxes in people.boxes])
    boxes = np.concatenate(people.boxes)
    identity = np.concatenate(people.identity)
    looks = rng.normal(size=(identity.max() + 2, DIM))[identity]  # -1: everybody else's
    real = looks + rng.normal(0, 2, looks.shape)
    image = np.tile(np.repeat(np.arange(len(counts)), counts), 2)
    scores = np.concatenate(
        [rng.uniform(THRESHOLD, 1, len(boxes)), rng.uniform(0, THRESHOLD, len(boxes))]
    )
    order = np.lexsort((-scores, image))
    embeddings = np.concatenate([real, rng.normal(size=real.shape)])[order]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    off = boxes + rng.normal(0, 3, boxes.shape)
    below = off + np.array([0, 250, 0, 250])
    return GalleryDetections(
        names=people.names,
        offsets=np.cumsum([0, *(2 * counts)]),
        boxes=np.concatenate([off, below])[order].astype(np.float32),
        scores=scores[order].astype(np.float32),
        embeddings=embeddings.astype(np.float32),
    )


def with_gallery_size(people: Annotations, size: Simulation, gallery: int) -> SearchProtocol:
    """As CUHK-SYSU's: every query has a gallery of its own, those with the person first."""
    rng = np.random.default_rng(2)
    everywhere = in_all_images(people, size)
    galleries = []
    for image, targets in zip(everywhere.query_image, everywhere.target_images, strict=True):
        taken = np.append(targets, image)
        others = rng.choice(size.images, gallery + len(taken), replace=False)
        others = others[~np.isin(others, taken)]
        galleries.append(np.concatenate([targets, others])[:gallery].astype(np.int32))
    return dataclasses.replace(everywhere, name=f"TestG{gallery}", gallery=tuple(galleries))


def in_all_images(people: Annotations, size: Simulation) -> SearchProtocol:
    """As PRW's: every query is searched in all other images."""
    rows = [
        (image, person)
        for image, labeled in enumerate(people.labeled)
        for person in np.flatnonzero(labeled)
    ]
    rng = np.random.default_rng(3)
    chosen = [rows[number] for number in rng.permutation(len(rows))[: size.queries]]
    queries = Queries(
        image=np.array([image for image, _ in chosen]),
        box=np.array([people.boxes[image][person] for image, person in chosen]),
        identity=np.array([people.identity[image][person] for image, person in chosen]),
    )
    everywhere = all_but(size.images, queries.image)
    protocol, _ = search_everywhere("all", people, queries, everywhere)
    return protocol


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a function holds at most while it runs, its result included."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
