"""Small training batches that NumPy draws, for the oracle and for us."""

from __future__ import annotations

import numpy as np

from alignps_jax.types import Batch


def make_scene(seed: int, identities: int, size: tuple[int, int]) -> Batch:
    """Two RGB images of coarse noise, in the bucket of multiples of 32, with five people each.

    There are overlaps, identity 0, and people without one.
    """
    rng = np.random.default_rng(seed)
    images, people, (height, width) = 2, 5, size
    corner = rng.uniform(0, 0.6, (images, people, 2)) * size[::-1]
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, corner.shape) * size[::-1]], -1)
    # Two boxes that nearly coincide: the smaller one has to win.
    boxes[:, 1] = boxes[:, 0] + np.array([-4, -3, 5, 6])
    identity = rng.integers(2, identities, (images, people)).astype(np.int32)
    identity[0, :2], identity[1, :2] = (0, 1), (1, 0)
    coarse = rng.integers(0, 256, (images, height // 10 + 1, width // 10 + 1, 3))
    fine = coarse.repeat(10, axis=1).repeat(10, axis=2).astype(np.uint8)
    padding = ((0, 0), (0, -height % 32), (0, -width % 32), (0, 0))
    return Batch(
        image=np.pad(fine[:, :height, :width, ::-1], padding),
        size=np.full((images, 2), size, np.int32),
        scale=np.ones((images, 2), np.float32),
        index=np.arange(images, dtype=np.int32),
        valid_image=np.ones(images, bool),
        boxes=boxes.clip(0, (*size[::-1], *size[::-1])).astype(np.float32),
        identity=identity,
        labeled=np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]], bool),
        valid=np.ones((images, people), bool),
    )
