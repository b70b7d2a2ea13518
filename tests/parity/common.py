"""The same weights and pixels for the PyTorch oracle and for us."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import load_arrays, load_weights
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.types import Batch, OIMMemory, Weights
from alignps_jax.weights.convert import convert_released
from tests.oracle import alignps_torch, roi_torch
from tests.oracle.training_torch import People, remember
from tests.parity.ours import released_config
from tests.places import SHARED

# Of everything, with `in_float64`.
DTYPE = "float64" if jax.config.jax_enable_x64 else "float32"
MODELS = ("cuhk", "cuhk_plus", "prw", "prw_plus")
ROI_MODELS = ("cuhk_roi", "prw_roi")
PHOTOS = {
    "cuhk": SHARED / "photos" / "gallery-1.jpg",
    "prw": next(iter(sorted((SHARED / "prw_sample" / "frames").glob("*.jpg"))), SHARED),
}
MEAN = np.array([103.530, 116.280, 123.675])


@dataclasses.dataclass(frozen=True)
class Pair:
    """A released model with random weights, in PyTorch and converted."""

    oracle: alignps_torch.AlignPS
    config: ConfigDict
    model: AlignPS
    weights: Weights
    memory: OIMMemory
    roi_memory: OIMMemory | None
    workdir: Path


def make_pair(
    name: str,
    folder: Path,
    *,
    gentle: bool = False,
    batches: Sequence[tuple[torch.Tensor, People]] = (),
    dtype: torch.dtype = torch.float32,
    **widths: int,
) -> Pair:
    """A pair whose our half went through a file as old mmcv writes them and --mode=convert.

    The memory holds embeddings of `batches`, random ones for all other identities; the queues'
    next slots are near their ends.
    """
    dataset, _, variant = name.partition("_")
    if variant == "roi":
        spec = roi_torch.roi_spec_of(dataset, **widths)
        oracle = roi_torch.random_roi_model(spec, gentle).to(dtype)
        oracle.header = spec.queue_size - 2
    else:
        spec = alignps_torch.spec_of(name, **widths)
        oracle = alignps_torch.random_model(spec, gentle).to(dtype)
    remember(oracle, batches)
    for buffer in oracle.bbox_head.buffers():
        buffer.copy_(buffer.float())  # a file of ours has no more digits
    oracle.bbox_head.unlabeled_matching_layer.tail.fill_(spec.queue_size - 2)
    source = folder / f"{name}.pth"
    meta = {"epoch": 24, "iter": 67272, "config": "model = dict()", "CLASSES": ("person",)}
    torch.save({"meta": meta, "state_dict": oracle.state_dict(), "optimizer": {}}, source)
    config = released_config(name, width=spec.width, channels=spec.channels, groups=spec.groups)
    convert_released(config, source, folder / name)
    source.unlink()
    model = build_model(config)
    weights = load_weights(folder / name, weights_template(model))
    stored = load_arrays(folder / name, lambda path: "memory/" in path)

    def memory(part: str) -> OIMMemory:
        return OIMMemory(*(jnp.asarray(stored[f"{part}/{x}"]) for x in ("lut", "queue", "tail")))

    roi_memory = None
    if variant == "roi":  # files do not hold the next slot
        roi_memory = memory("roi_memory").replace(tail=jnp.int32(oracle.header))
    return Pair(oracle, config, model, weights, memory("memory"), roi_memory, folder / name)


def photo(dataset: str) -> np.ndarray:
    """A real photo (BGR), or noise where there is none."""
    if PHOTOS[dataset].is_file():
        return cv2.imread(str(PHOTOS[dataset]))
    return np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)


def released_pixels(image: np.ndarray, scale: tuple[int, int]) -> tuple[torch.Tensor, tuple, tuple]:
    """A BGR photo as the released code feeds it: pixels [1, 3, H, W], size, factors (x, y)."""
    height, width = image.shape[:2]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = int(height * factor + 0.5), int(width * factor + 0.5)
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return normalize(image[None]), size, (size[1] / width, size[0] / height)


def normalize(images: np.ndarray, dtype: str = "float32") -> torch.Tensor:
    """BGR images of one size to mean-free pixels, zero up to a multiple of 32."""
    height, width = images.shape[1:3]
    padding = ((0, 0), (0, -height % 32), (0, -width % 32), (0, 0))
    pixels = np.pad(images.astype(dtype) - MEAN.astype(dtype), padding)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def scene_for_oracle(scene: Batch, dtype: str = "float32") -> tuple[torch.Tensor, People]:
    """The pixels and people of a batch; without an identity, people have -1."""
    height, width = scene.size[0]
    boxes = torch.from_numpy(scene.boxes.astype(dtype))
    ids = torch.from_numpy(np.where(scene.labeled, scene.identity, -1))
    pixels = normalize(scene.image[:, :height, :width, ::-1], dtype)
    return pixels, list(zip(boxes, ids, strict=True))
