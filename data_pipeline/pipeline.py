"""From a prepared split to batches: each is planned first, then its photos decoded in threads.

A plan is a pure function of (split, configuration, seed, step): a resumed run sees the same
batches, and a process knows the shapes of its peers'.
"""

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict

from alignps_jax.distributed import is_main_process
from alignps_jax.errors import UserError, blame
from alignps_jax.media import decode_photo
from alignps_jax.types import Batch
from data_pipeline import transforms
from data_pipeline.buckets import choose_buckets
from data_pipeline.prepared import PreparedSplit, with_boxes
from data_pipeline.transforms import Scale, Size

if TYPE_CHECKING:  # inference on single photos does without
    import grain


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """What goes into one global batch of B rows, before any image is read.

    `indices` are positions in the split, `sizes` the (height, width) to resize each image to,
    `flips` which are mirrored, `bucket` the (height, width) that all are padded to. Rows that are
    not `valid` stay empty.
    """

    indices: Int[np.ndarray, "B"]
    sizes: Int[np.ndarray, "B 2"]
    flips: Bool[np.ndarray, "B"]
    valid: Bool[np.ndarray, "B"]
    bucket: Size

    def shard(self, index: int, count: int) -> Self:
        """The rows of process `index` of `count`: equal, consecutive parts of the global batch."""
        share = len(self.indices) // count
        rows = slice(index * share, (index + 1) * share)
        arrays = self.indices[rows], self.sizes[rows], self.flips[rows], self.valid[rows]
        return type(self)(*arrays, self.bucket)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Turns plans into the rows of `process`: its index, and the number of all."""

    split: PreparedSplit = dataclasses.field(repr=False)
    data: ConfigDict
    process: tuple[int, int]

    @cached_property
    def people(self) -> int:
        """G, the static number of boxes per image: enough for all images of the split."""
        return _round_people(max(map(len, self.split.annotations.boxes), default=0))

    def read(self, plan: BatchPlan, each: Callable[..., Iterable[None]] = map) -> Batch:
        """The rows of this process; `each` maps over them. UserError if a photo is damaged."""
        plan = plan.shard(*self.process)
        batch = transforms.empty_batch(len(plan.indices), plan.bucket, self.people)
        batch.image[~plan.valid] = 0
        rows = np.flatnonzero(plan.valid).tolist()
        deque(each(partial(self._fill, batch, plan), rows), maxlen=0)
        return batch

    def iterate(self, plan: Callable[[int], BatchPlan], count: int) -> "grain.DatasetIterator":
        """Reads plans 0 .. count - 1 in order, some ahead, their images in threads.

        So the memory is that of `data.prefetch` batches, and of a decoded photo per worker.
        """
        import grain

        # Every thread has an image of its own; OpenCV's own threads would only get in the way.
        cv2.setNumThreads(0)
        ahead = self.data.prefetch if self.data.workers else 0
        each = futures.ThreadPoolExecutor(self.data.workers).map if ahead else map
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(count).map(lambda step: self.read(plan(step), each))
        return iter(steps.to_iter_dataset(options))

    def _fill(self, batch: Batch, plan: BatchPlan, row: int) -> None:
        index, flip = int(plan.indices[row]), bool(plan.flips[row])
        size = (int(plan.sizes[row, 0]), int(plan.sizes[row, 1]))
        batch.index[row] = index
        transforms.fill_image(batch, row, photo_of(self.split, index), size, flip)
        transforms.fill_people(batch, row, self.split.annotations, index, size, flip)


@dataclasses.dataclass(frozen=True)
class TrainPipeline:
    """The training batches of one process.

    An epoch visits the images of each orientation in a new order, whose front fills up the last
    batch. Scale and flip are drawn per row. With `data.max_programs`, groups of like aspect ratios
    take the place of orientations, and a scale is drawn per batch.
    """

    reader: BatchReader
    groups: tuple[Int[np.ndarray, "_"], ...]
    # (height, width) of all images of the split at each of the S training scales.
    sizes: Int[np.ndarray, "N S 2"] = dataclasses.field(repr=False)
    buckets: tuple[Size, ...]
    seed: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every usable image comes at least once."""
        return sum(math.ceil(len(group) / self.batch_size) for group in self.groups)

    def plan(self, step: int) -> BatchPlan:
        """What global batch `step` holds, the same in every process."""
        epoch, position = divmod(step, self.steps_per_epoch)
        epoch_indices, epoch_scales, epoch_flips = self._epoch(epoch)
        indices = epoch_indices[position]
        sizes = self.sizes[indices, epoch_scales[position]]
        height, width = sizes.max(axis=0)
        return BatchPlan(
            indices=indices,
            sizes=sizes,
            flips=epoch_flips[position],
            valid=np.ones(len(indices), bool),
            bucket=transforms.smallest_bucket((int(height), int(width)), self.buckets),
        )

    def _epoch(
        self, epoch: int
    ) -> tuple[Int[np.ndarray, "E B"], Int[np.ndarray, "E B"], Bool[np.ndarray, "E B"]]:
        """Images, scales and flips of the E batches of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = self.batch_size
        # np.resize repeats from the front.
        batches = [
            np.resize(rng.permutation(group), (math.ceil(len(group) / rows), rows))
            for group in self.groups
        ]
        indices = rng.permutation(np.concatenate(batches))
        draws = (len(indices), 1) if self.reader.data.max_programs else indices.shape
        scales = np.broadcast_to(rng.integers(self.sizes.shape[1], size=draws), indices.shape)
        return indices, scales, rng.random(indices.shape) < self.reader.data.flip_probability

    def iterator(self, total_steps: int) -> "grain.DatasetIterator":
        """Batches 0 .. `total_steps` - 1 in order, prefetched.

        Its `get_state()` is a small JSON-able dict; `set_state(state)` makes the next batch the
        one that followed when the state was taken.
        """
        return self.reader.iterate(self.plan, total_steps)

    def names(self, index: Int[np.ndarray, "B"]) -> tuple[str, ...]:
        """The images' names, given `Batch.index`."""
        return tuple(self.reader.split.annotations.names[i] for i in index)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Every image of a split once, at the test scale: landscape first, each in split order.

    The last batch of each orientation is filled up with rows that are not valid.
    """

    reader: BatchReader
    plans: tuple[BatchPlan, ...]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Batch]:
        return self.reader.iterate(self.plans.__getitem__, len(self.plans))


def make_train_pipeline(
    split: PreparedSplit,
    data: ConfigDict,
    *,
    seed: int,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> TrainPipeline:
    """Plans the training batches of a split, without images that have nobody or are too small.

    The `seed`, not negative, decides on order, scales and flips. `batch_size` counts the images of
    all processes; `process` is the index of this one and their number.

    Raises:
      UserError: no image can be trained on, or `data.max_programs` is too small.
    """
    split, usable = _trainable(split, data.min_side)
    sizes = transforms.rescaled_sizes(split.sizes, data.train_scales)
    groups = tuple(_orientations(split.sizes, usable))
    shapes = transforms.buckets(data.train_scales)
    if data.max_programs:
        groups, shapes = choose_buckets(sizes, usable, data.max_programs, batch_size)
    return TrainPipeline(
        reader=BatchReader(split, data, process),
        groups=groups,
        sizes=sizes,
        buckets=shapes,
        seed=seed,
        batch_size=batch_size,
    )


def make_eval_batches(
    split: PreparedSplit, data: ConfigDict, *, batch_size: int, process: tuple[int, int] = (0, 1)
) -> EvalBatches:
    """Plans one pass over a split; see `make_train_pipeline` for the arguments."""
    sizes = transforms.rescaled_sizes(split.sizes, [data.test_scale])[:, 0]
    plans = []
    for group in _orientations(split.sizes, np.arange(len(sizes))):
        bucket = _test_bucket(tuple(split.sizes[group[0]]), data.test_scale)
        for start in range(0, len(group), batch_size):
            indices = group[start : start + batch_size]
            filled, flips = np.resize(indices, batch_size), np.zeros(batch_size, bool)
            valid = np.arange(batch_size) < len(indices)
            plans.append(BatchPlan(filled, sizes[filled], flips, valid, bucket))
    return EvalBatches(BatchReader(split, data, process), tuple(plans))


def photo_of(split: PreparedSplit, index: int) -> UInt8[np.ndarray, "H W 3"]:
    """A photo of a split, RGB; UserError if it cannot be decoded."""
    with blame(f"image {split.annotations.names[index]}"):
        return decode_photo(split.encoded(index), sys.maxsize, split.upright)


def single_image_batch(image: UInt8[np.ndarray, "H W 3"], data: ConfigDict) -> Batch:
    """One RGB photo as the evaluation with `config.data` sees it: a row without people."""
    size = image.shape[:2]
    batch = transforms.empty_batch(1, _test_bucket(size, data.test_scale), _round_people(0))
    (height, width), *_ = transforms.rescaled_sizes(np.array([size]), [data.test_scale])[0].tolist()
    transforms.fill_image(batch, 0, np.ascontiguousarray(image), (height, width), flip=False)
    return batch


def _trainable(split: PreparedSplit, min_side: int) -> tuple[PreparedSplit, Int[np.ndarray, "n"]]:
    """The split without boxes that have a side below a pixel, and its images to train on.

    These have people, and no side below `min_side`; how many others there are is printed.
    """
    people, boxes = split.annotations, np.concatenate(split.annotations.boxes)
    people = with_boxes(people, boxes, (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1))
    empty = np.array([len(rows) == 0 for rows in people.boxes], bool)
    small = ~empty & (split.sizes < min_side).any(axis=1)
    usable = np.flatnonzero(~(empty | small))
    found = (
        f"{len(empty) - len(usable)} of {len(empty)} images left out of training ({empty.sum()} "
        f"without a usable box, {small.sum()} with a side below {min_side} pixels)"
    )
    if not len(usable):
        raise UserError(f"training set: {found}; expected at least one to train on")
    if len(usable) < len(empty) and is_main_process():
        print(found)
    return dataclasses.replace(split, annotations=people), usable


def _orientations(
    sizes: Int[np.ndarray, "N 2"], indices: Int[np.ndarray, "n"]
) -> list[Int[np.ndarray, "_"]]:
    """Images in landscape, and in portrait, in the given order; without an empty group."""
    landscape = np.array([transforms.is_landscape(sizes[i]) for i in indices], bool)
    return [group for group in (indices[landscape], indices[~landscape]) if len(group)]


def _test_bucket(size: Size | Int[np.ndarray, "2"], scale: Scale) -> Size:
    """The bucket of the test scale that photos of this orientation share."""
    return transforms.buckets([scale])[0 if transforms.is_landscape(size) else -1]


def _round_people(people: int) -> int:
    """At least 8 and a multiple of 8, so that data sets differ in few compiled shapes."""
    return max(8, math.ceil(people / 8) * 8)
