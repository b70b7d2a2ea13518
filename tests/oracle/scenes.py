"""Small training batches that NumPy draws, for the oracle and for us."""

from __future__ import annotations

import dataclasses

import numpy as np

from alignps_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Scene:
    """Two BGR images of one size with people; `identity` counts where `labeled`."""

    images: np.ndarray
    boxes: np.ndarray
    identity: np.ndarray
    labeled: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1:3]

    @property
    def ids(self) -> np.ndarray:
        """Identities as the oracle wants them: -1 for people without one."""
        return np.where(self.labeled, self.identity, -1)

    def batch(self) -> Batch:
        """As our pipeline delivers it: RGB, in the bucket of multiples of 32."""
        count, (height, width) = len(self.images), self.size
        padding = ((0, 0), (0, -height % 32), (0, -width % 32), (0, 0))
        return Batch(
            image=np.pad(self.images[..., ::-1], padding),
            size=np.tile(np.int32(self.size), (count, 1)),
            scale=np.ones((count, 2), np.float32),
            index=np.arange(count, dtype=np.int32),
            valid_image=np.ones(count, bool),
            boxes=self.boxes,
            identity=self.identity,
            labeled=self.labeled,
            valid=np.ones(self.labeled.shape, bool),
        )


def make_scene(seed: int, identities: int, size: tuple[int, int]) -> Scene:
    """Coarse noise with five people per image: overlaps, identity 0, and people without one."""
    rng = np.random.default_rng(seed)
    images, people = 2, 5
    corner = rng.uniform(0, 0.6, (images, people, 2)) * size[::-1]
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, corner.shape) * size[::-1]], -1)
    # Two boxes that nearly coincide: the smaller one has to win.
    boxes[:, 1] = boxes[:, 0] + np.array([-4, -3, 5, 6])
    boxes = boxes.clip(0, (*size[::-1], *size[::-1])).astype(np.float32)
    identity = rng.integers(2, identities, (images, people)).astype(np.int32)
    identity[0, :2], identity[1, :2] = (0, 1), (1, 0)
    coarse = rng.integers(0, 256, (images, size[0] // 10 + 1, size[1] // 10 + 1, 3))
    fine = coarse.repeat(10, axis=1).repeat(10, axis=2).astype(np.uint8)
    return Scene(
        images=fine[:, : size[0], : size[1]],
        boxes=boxes,
        identity=identity,
        labeled=np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]], bool),
    )
