"""Many photos through a detector: decoded ahead in threads, batched per bucket, in order."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

# So many batches may come before the photos that wait for others of their shape.
_PATIENCE = 4


@runtime_checkable  # as beartype asks where shapes are checked
class DetectsBatches(Protocol):
    """What finds the people of batches, on all local devices."""

    config: ConfigDict

    def rows(self, bucket: tuple[int, int]) -> int:
        """How many photos of a shape it takes at a time."""

    def detect_batch(self, batch: Batch) -> Detections:
        """Detections [devices, B / devices, K] of so many, perhaps still being computed."""


@runtime_checkable
class FindsPeople(DetectsBatches, Protocol):
    """What a gallery is made with: a `Detector`, or what stands in for one."""

    # Where its weights come from, for people to read.
    name: str

    @property
    def fingerprint(self) -> str:
        """Equal for equal weights only."""

    def detect(self, image: Image) -> Detections:
        """All detections [K] of a photo, best first."""


@dataclasses.dataclass(frozen=True)
class Read(Generic[Tag_co]):
    """What reading a photo gave: its pixels, or why there are none.

    Without both it is a pause: everything before it is finished at once.
    """

    tag: Tag_co
    image: Image | None = None
    error: UserError | None = None


@dataclasses.dataclass(frozen=True)
class Result(Generic[Tag]):
    """The detections of a photo, all valid and best first, or why there are none (or a pause)."""

    tag: Tag
    found: Detections | None
    error: UserError | None


@dataclasses.dataclass(frozen=True)
class _Prepared(Generic[Tag]):
    tag: Tag
    batch: Batch | None
    error: UserError | None


def detect_all(
    detector: DetectsBatches,
    tasks: Iterable[Callable[[], Read[Tag]]],
    threads: int | None = None,
) -> Generator[Result[Tag], None, None]:
    """The people of many photos, in the order of the tasks.

    Needs memory for a few batches only, whatever the number of photos. The device never waits
    where reading is faster than the network.

    Args:
      detector: what finds them.
      tasks: each reads a photo; they run in threads, and the iterator itself in one, ahead.
      threads: to read in; default: one per core.
    """
    data = detector.config.data

    def prepare(task: Callable[[], Read[Tag]]) -> _Prepared[Tag]:
        read = task()
        if read.image is None:
            return _Prepared(read.tag, None, read.error)
        try:
            return _Prepared(read.tag, single_image_batch(read.image, data), None)
        except UserError as error:
            return _Prepared(read.tag, None, error)

    threads = threads or len(os.sched_getaffinity(0))
    return _in_order(detector, _ahead(prepare, tasks, threads))


def _in_order(
    detector: DetectsBatches, prepared: Iterable[_Prepared[Tag]]
) -> Generator[Result[Tag], None, None]:
    waiting: dict[tuple[int, int], list[int]] = {}  # photos of a bucket, by number
    photos: dict[int, _Prepared[Tag]] = {}
    under_way: deque[tuple[list[int], Detections]] = deque()
    results: dict[int, Result[Tag]] = {}
    given = 0

    def start(bucket: tuple[int, int]) -> None:
        numbers = waiting.pop(bucket)
        batch = _joined([photos[i].batch for i in numbers], detector.rows(bucket))
        under_way.append((numbers, detector.detect_batch(batch)))

    def finish() -> None:
        numbers, found = under_way.popleft()
        host = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(found))
        for row, number in enumerate(numbers):
            results[number] = Result(photos.pop(number).tag, _row(host, row), None)

    def start_all() -> None:
        for bucket in list(waiting):
            start(bucket)

    def finish_all() -> None:
        while under_way:
            finish()

    def ready() -> Iterator[Result[Tag]]:
        nonlocal given
        while given in results:
            yield results.pop(given)
            given += 1

    for number, photo in enumerate(prepared):
        if photo.batch is None:
            results[number] = Result(photo.tag, None, photo.error)
            if photo.error is None:
                start_all()
                finish_all()
        else:
            photos[number] = photo
            bucket = (photo.batch.image.shape[1], photo.batch.image.shape[2])
            waiting.setdefault(bucket, []).append(number)
            if len(waiting[bucket]) == detector.rows(bucket):
                start(bucket)
            for other in [b for b in waiting if number - waiting[b][0] > _limit(detector, b)]:
                start(other)
        # A batch is read back once the next one is under way: the device never waits for us.
        while len(under_way) > 1:
            finish()
        yield from ready()
    start_all()
    finish_all()
    yield from ready()


def _limit(detector: DetectsBatches, bucket: tuple[int, int]) -> int:
    return _PATIENCE * detector.rows(bucket)


def _joined(batches: list[Any], rows: int) -> Batch:
    """Photos as one batch, filled up with rows that are not valid."""
    fill = dataclasses.replace(
        jax.tree.map(np.zeros_like, batches[0]), size=batches[0].size, scale=batches[0].scale
    )
    parts = [*batches, *[fill] * (rows - len(batches))]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _row(found: Detections, row: int) -> Detections:
    valid = found.valid[row]
    return jax.tree.map(lambda x: x[row][valid], found)


def _ahead(
    work: Callable[[Any], Any], tasks: Iterable[Callable[[], Any]], threads: int
) -> Iterator[Any]:
    """`work` of each task, in order, computed in threads a little ahead of whoever asks."""
    results: queue.Queue[Future[Any] | None] = queue.Queue(maxsize=2 * threads)
    stop = threading.Event()

    def put(future: Future[Any] | None) -> bool:
        while not stop.is_set():
            try:
                results.put(future, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    with ThreadPoolExecutor(threads, "read") as pool:

        def feed() -> None:
            try:
                for task in tasks:
                    if stop.is_set() or not put(pool.submit(work, task)):
                        return
                put(None)
            except BaseException as error:
                failed: Future[Any] = Future()
                failed.set_exception(error)
                put(failed)

        feeder = threading.Thread(target=feed, name="feed", daemon=True)
        feeder.start()
        try:
            while (future := results.get()) is not None:
                yield future.result()
        finally:
            stop.set()
            feeder.join()
            pool.shutdown(cancel_futures=True)
