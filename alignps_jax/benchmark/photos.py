"""Photos and people that the benchmark makes up, as many and as large as a part wants."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from alignps_jax.types import Annotations
from data_pipeline.datasets import PreparedSplit
from data_pipeline.transforms import Size

_QUALITY = 92


def made_up_split(count: int, size: Size, *, people: int = 4, seed: int = 0) -> PreparedSplit:
    """Photos of (height, width) with some people each; half of the people have an identity.

    Detail falls off with frequency as in natural images and the JPEG quality is a camera's, so
    that a pixel takes as many bytes, and as long to decode, as one of a real photo.
    """
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.8, (count, people, 2))
    boxes = np.concatenate([corner, corner + 0.2], axis=2) * np.tile(size[::-1], 2)
    annotations = Annotations(
        names=tuple(f"photo-{number}.jpg" for number in range(count)),
        boxes=tuple(boxes.astype(np.float32)),
        identity=tuple(np.tile(np.arange(people, dtype=np.int32), (count, 1))),
        labelled=tuple(np.tile(np.arange(people) % 2 == 0, (count, 1))),
        camera=np.zeros(count, np.int32),
    )
    jpegs = tuple(_jpeg(_photo(rng, size)) for _ in range(count))
    return PreparedSplit(annotations, np.tile(np.array(size, np.int32), (count, 1)), jpegs)


def _photo(rng: np.random.Generator, size: Size) -> UInt8[np.ndarray, "H W 3"]:
    """Noise of all scales, each twice as fine and a little fainter than the one before."""
    height, width = size
    photo = np.full((height, width, 3), 128, np.float32)
    side, strength = 4, 40.0
    while side < max(size):
        noise = rng.normal(0, strength, (side, side, 3)).astype(np.float32)
        photo += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        side, strength = 2 * side, 0.62 * strength
    return photo.clip(0, 255).astype(np.uint8)


def _jpeg(photo: UInt8[np.ndarray, "H W 3"]) -> bytes:
    encoded, data = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert encoded
    return data.tobytes()
