"""What is planned of a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from data_pipeline.transforms import Size


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

    @property
    def padding(self) -> float:
        """The share of the batch's pixels that come from no photo."""
        photos = self.sizes.astype(np.int64).prod(axis=1)[self.valid].sum()
        return float(1 - photos / (len(self.sizes) * self.bucket[0] * self.bucket[1]))

    def shard(self, process_index: int, process_count: int) -> BatchPlan:
        """The rows of one process: the global batch in equal, consecutive parts."""
        share = len(self.indices) // process_count
        rows = slice(process_index * share, (process_index + 1) * share)
        per_row = ("indices", "sizes", "flips", "valid")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in per_row})
