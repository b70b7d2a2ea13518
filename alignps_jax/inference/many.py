"""Many photos through a network: read ahead in threads, batched per bucket, in their order."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from alignps_jax.media import Shot
from alignps_jax.types import Batch, Detections, UserError
from data_pipeline.pipeline import single_image_batch

Tag = TypeVar("Tag")

# A photo waits for others of its shape until this many batches have come after it.
_PATIENCE = 4


@dataclasses.dataclass
class Photo(Generic[Tag]):
    """A photo on its way to its detections; `tag` is what the caller knows it by.

    One with neither image nor error passes through with its turn.
    """

    tag: Tag
    image: UInt8[np.ndarray, "_H _W 3"] | None = None  # until `batch` holds it
    error: UserError | OSError | None = None  # why there are no detections
    batch: Batch | None = None  # one row, until the network has it
    found: Detections | None = None  # all valid and best first
    done: bool = False


def shot_photo(task: Callable[[], Shot]) -> Photo[Shot]:
    """What a task of `media.shots` reads; the tag is the shot without its pixels."""
    shot = task()
    return Photo(dataclasses.replace(shot, image=None), shot.image, shot.error)


def detect_all(
    detect: Callable[[Batch], Detections],
    data: ConfigDict,
    rows: int,
    tasks: Iterable[Callable[[], Photo[Tag]]],
) -> Generator[Photo[Tag], None, None]:
    """The people of many photos, in the order of the tasks; `data` is `config.data`.

    Each task reads a photo, in a thread, a few ahead: memory holds a few batches, and the device
    does not wait unless reading is slower. `detect` gives the detections [devices, rows / devices,
    K] of a batch of `rows` photos.
    """
    photos: deque[Photo[Tag]] = deque()  # those whose turn has not come
    waiting: dict[tuple[int, ...], list[Photo[Tag]]] = {}
    running: deque[tuple[list[Photo[Tag]], Detections]] = deque()

    def start(bucket: tuple[int, ...]) -> None:
        started = waiting.pop(bucket)
        running.append((started, detect(join([photo.batch for photo in started], rows))))
        for photo in started:
            photo.batch = None

    def finish(remaining: int) -> Iterator[Photo[Tag]]:
        while len(running) > remaining:
            started, found = running.popleft()
            for photo, people in zip(started, people_of(found), strict=False):
                photo.found, photo.done = people, True
        while photos and photos[0].done:
            yield photos.popleft()

    for photo in _ahead(data, tasks):
        photos.append(photo)
        photo.done = photo.batch is None
        if photo.batch is not None:
            bucket = photo.batch.image.shape[1:3]
            waiting.setdefault(bucket, []).append(photo)
            if len(waiting[bucket]) == rows:
                start(bucket)
        # A portrait among many landscapes does not hold them up.
        if len(photos) > _PATIENCE * rows and photos[0].batch is not None:
            start(photos[0].batch.image.shape[1:3])
        # A batch is read back once the next one runs, so that the device never waits.
        yield from finish(1)
    for bucket in list(waiting):
        start(bucket)
    yield from finish(0)


def above(found: Detections, threshold: float) -> Detections:
    """The detections of one photo with at least that score."""
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(found.scores) >= threshold], found)


def join(batches: Sequence[Any], rows: int) -> Batch:
    """Batches of one photo each as one batch, filled up to `rows` with rows that are not valid."""
    fill = jax.tree.map(np.zeros_like, batches[0])
    fill = dataclasses.replace(fill, size=batches[0].size, scale=batches[0].scale)
    parts = [*batches, *[fill] * (rows - len(batches))]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def people_of(found: Detections) -> Iterator[Detections]:
    """The valid detections of each photo of a batch [devices, B / devices, K], on the host."""
    host = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(found))
    for row, valid in enumerate(host.valid):
        yield jax.tree.map(lambda x, row=row, valid=valid: x[row][valid], host)


def _ahead(data: ConfigDict, tasks: Iterable[Callable[[], Photo[Tag]]]) -> Iterator[Photo[Tag]]:
    """The photos of the tasks, in order, prepared in threads a little ahead of the caller."""

    def prepare(task: Callable[[], Photo[Tag]]) -> Photo[Tag]:
        photo = task()
        if photo.image is not None:
            photo.batch, photo.image = single_image_batch(photo.image, data), None
        return photo

    threads = len(os.sched_getaffinity(0))
    futures: deque[Future[Photo[Tag]]] = deque()
    with ThreadPoolExecutor(threads, "read") as pool:
        for task in tasks:
            futures.append(pool.submit(prepare, task))
            if len(futures) > 2 * threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
