"""Random weights by released name, from NumPy's generator: the same with and without PyTorch.

Activations keep a sane size, the offsets of the deformable convolutions are around a pixel, and
the head finds people of about 80 pixels, so that every path of the network matters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np


def random_state_dict(
    shapes: Mapping[str, tuple[int, ...]], seed: int, gentle: bool = False
) -> dict[str, np.ndarray]:
    """A state dict; every tensor depends on the seed, its name and its shape only.

    `gentle` has the smaller activations (around 0.5) and predictions of a trained network:
    otherwise gradients are so large that training is chaotic, and rounding differences grow
    tenfold in every step.
    """
    return {name: _tensor(name, tuple(shape), seed, gentle) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int, gentle: bool) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape)
    module, leaf = name.rsplit(".", 1)
    if leaf in ("num_batches_tracked", "tail"):
        return np.asarray(rng.integers(0, 7), np.int64)
    if leaf in ("lookup_table", "queue", "lut", "cq"):
        value = normal / np.linalg.norm(normal, axis=1, keepdims=True)
        if leaf == "queue":
            value[:, 64:] = 0
    elif leaf == "scale":
        value = 1 + 0.1 * normal
    elif leaf == "running_var":
        value = 1 + 0.2 * rng.random(shape)
    elif leaf == "running_mean":
        value = 0.1 * normal
    elif len(shape) in (2, 4):
        value = normal * _gain(module, gentle) / math.sqrt(math.prod(shape[1:]))
    elif leaf == "weight":  # of a normalization
        value = ((0.2 if gentle else 0.4) if module.endswith("bn3") else 1) * (1 + 0.1 * normal)
    else:
        offset = {"bbox_head.conv_cls": -2.0, "bbox_head.conv_reg": 4.0}.get(module, 0.0)
        value = offset + 0.1 * normal
    return np.asarray(value, np.float32)


def _gain(module: str, gentle: bool) -> float:
    """Standard deviation of the output for an input of second moment one."""
    if module == "backbone.conv1":
        return math.sqrt(2) / (512 if gentle else 64)  # pixels
    if module.endswith("conv_offset"):
        return 0.5
    if module == "bbox_head.conv_reg":
        return 0.2 if gentle else 0.7
    if module in ("bbox_head.conv_cls", "bbox_head.conv_centerness"):
        return 0.5 if gentle else 4.0
    if module.startswith("neck"):
        return 1.0
    if module == "rpn_head.rpn_reg":
        return 0.3 if gentle else 1.0
    if module == "mi_estimator.T_func.0":
        return 16.0  # of vectors of length one
    return math.sqrt(2)
