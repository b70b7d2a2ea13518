"""Many photos through a detector: decoded ahead in threads, batched per bucket, in order."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from alignps_jax.types import Batch, Detections, UserError
from data_pipeline.pipeline import single_image_batch

Tag = TypeVar("Tag")
Tag_co = TypeVar("Tag_co", covariant=True)
Image = UInt8[np.ndarray, "_H _W 3"]
Size = tuple[int, int]

# A photo waits for others of its shape until this many batches have come after it.
_PATIENCE = 4


@runtime_checkable  # as beartype asks where shapes are checked
class FindsPeople(Protocol):
    """What a gallery is made with: a `Detector`, which see, or a stand-in for one."""

    config: ConfigDict
    name: str
    rows: int

    @property
    def fingerprint(self) -> str: ...

    def detect(self, photo: Image, /) -> Detections: ...

    def detect_batch(self, batch: Batch) -> Detections: ...


@dataclasses.dataclass(frozen=True)
class Read(Generic[Tag_co]):
    """The pixels of a photo, or why there are none (neither: see `pause`)."""

    tag: Tag_co
    image: Image | None = None
    error: UserError | None = None


def pause() -> Read[None]:
    """A task after which no other is taken before the results of all tasks so far are given."""
    return Read(None)


@dataclasses.dataclass(frozen=True)
class Result(Generic[Tag]):
    """The detections of a photo, all valid and best first, or why there are none (or a pause)."""

    tag: Tag
    found: Detections | None
    error: UserError | None


@dataclasses.dataclass
class _Photo(Generic[Tag]):
    """A photo on its way: a batch of one row until the network has it, then the result."""

    tag: Tag
    batch: Batch | None
    result: Result[Tag] | None


def detect_all(
    detector: FindsPeople, tasks: Iterable[Callable[[], Read[Tag]]]
) -> Generator[Result[Tag], None, None]:
    """The people of many photos, in the order of the tasks.

    Memory holds a few batches, whatever the number of photos. The device does not wait where
    reading is faster than the network.

    Args:
      detector: finds the people.
      tasks: each reads a photo, in a thread; they are taken a few ahead.
    """
    photos: deque[_Photo[Tag]] = deque()  # those whose result has not been given yet
    waiting: dict[Size, list[_Photo[Tag]]] = {}
    running: deque[tuple[list[_Photo[Tag]], Detections]] = deque()

    def start(bucket: Size) -> None:
        started = waiting.pop(bucket)
        batch = join([photo.batch for photo in started], detector.rows)
        running.append((started, detector.detect_batch(batch)))
        for photo in started:
            photo.batch = None

    def finish(remaining: int) -> None:
        while len(running) > remaining:
            started, found = running.popleft()
            for photo, people in zip(started, people_of(found), strict=False):
                photo.result = Result(photo.tag, people, None)

    def finish_all() -> None:
        for bucket in list(waiting):
            start(bucket)
        finish(0)

    def done() -> Iterator[Result[Tag]]:
        while photos and (result := photos[0].result) is not None:
            photos.popleft()
            yield result

    for photo in _ahead(partial(_prepare, detector.config.data), tasks):
        photos.append(photo)
        if photo.batch is not None:
            group = waiting.setdefault(_bucket(photo.batch), [])
            group.append(photo)
            if len(group) == detector.rows:
                start(_bucket(photo.batch))
        elif photo.result and photo.result.error is None:  # a pause
            finish_all()
        # A portrait among many landscapes does not hold them up.
        if len(photos) > _PATIENCE * detector.rows and photos[0].batch is not None:
            start(_bucket(photos[0].batch))
        # A batch is read back once the next one runs, so that the device never waits.
        finish(1)
        yield from done()
    finish_all()
    yield from done()


def join(batches: Sequence[Any], rows: int) -> Batch:
    """Batches of one photo each as one batch, filled up to `rows` with rows that are not valid."""
    fill = dataclasses.replace(
        jax.tree.map(np.zeros_like, batches[0]), size=batches[0].size, scale=batches[0].scale
    )
    parts = [*batches, *[fill] * (rows - len(batches))]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def people_of(found: Detections) -> Iterator[Detections]:
    """The valid detections of each photo of a batch [devices, B / devices, K], on the host."""
    host = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(found))
    for row, valid in enumerate(host.valid):
        yield jax.tree.map(lambda x, row=row, valid=valid: x[row][valid], host)


def _bucket(batch: Batch) -> Size:
    return batch.image.shape[1], batch.image.shape[2]


def _prepare(data: ConfigDict, task: Callable[[], Read[Tag]]) -> _Photo[Tag]:
    read = task()
    batch, error = None, read.error
    if read.image is not None:
        try:
            batch = single_image_batch(read.image, data)
        except UserError as wrong:
            error = wrong
    return _Photo(read.tag, batch, None if batch else Result(read.tag, None, error))


def _ahead(
    work: Callable[[Any], Any], tasks: Iterable[Callable[[], Any]]
) -> Generator[Any, None, None]:
    """`work` of each task, in order, computed in threads a little ahead of the caller."""
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads, "read")
    futures: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            futures.append(pool.submit(work, task))
            while len(futures) > (0 if task is pause else 2 * threads):
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
