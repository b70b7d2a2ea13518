"""Deformable convolution at the shapes of the paper's network, beside torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from alignps_jax.experiments.benchmark import Row, peak_memory
from alignps_jax.nn.deform_conv import deform_conv2d
from tests.benchmark.measure import Context

# Channels, features, height and width of each convolution for one photo of 1500×900.
LAYERS = {
    "lateral3": (512, 256, 113, 188),
    "lateral4": (1024, 256, 57, 94),
    "lateral5": (2048, 256, 29, 47),
    "output3": (768, 256, 113, 188),
    "tower, modulated": (256, 256, 113, 188),
}


def rows(context: Context) -> Iterator[Row]:
    """Forward, then forward and backward (in input, offsets, kernel, mask), of every layer."""
    for name, (channels, features, *place) in LAYERS.items():
        arrays = random_arrays(channels, features, *place, modulated="modulated" in name)
        for backward in (False, True):
            program = jax.jit(gradient if backward else forward).lower(arrays).compile()
            functions = {"ours": partial(program, jax.device_put(arrays))}
            functions |= context.with_torch(partial(torch_work, context, arrays, backward))
            what = f"{name} {channels}→{features} at {place[0]}×{place[1]}, forward"
            what += " + backward" * backward
            yield context.row(what, functions, **{"memory, GB": peak_memory(program)})


def random_arrays(
    channels: int, features: int, height: int, width: int, modulated: bool
) -> dict[str, np.ndarray]:
    """Arguments of `deform_conv2d`; offsets of a few pixels."""
    rng, place = np.random.default_rng(0), (1, height, width)
    arrays = {
        "inputs": rng.normal(size=(*place, channels)),
        "offsets": 2 * rng.normal(size=(*place, 9, 2)),
        "kernel": rng.normal(size=(3, 3, channels, features)) / (9 * channels) ** 0.5,
    }
    arrays |= {"mask": rng.uniform(size=(*place, 9))} if modulated else {}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def forward(arrays: dict[str, jax.Array]) -> jax.Array:
    """The convolution."""
    return deform_conv2d(**arrays)


gradient = jax.grad(lambda arrays: (forward(arrays) ** 2).sum())


def torch_work(
    context: Context, arrays: dict[str, np.ndarray], backward: bool
) -> Callable[[], object]:
    """The same work by `torchvision.ops.deform_conv2d`, in its own layout."""
    from torchvision.ops import deform_conv2d as torch_deform_conv2d

    def tensor(name: str, array: np.ndarray) -> Any:
        if name == "kernel":
            array = array.transpose(3, 2, 0, 1)
        else:
            array = array.reshape(*array.shape[:3], -1).transpose(0, 3, 1, 2)
        found = context.torch.tensor(np.ascontiguousarray(array), device=context.torch_device)
        return found.requires_grad_(backward)

    tensors = [tensor(name, array) for name, array in arrays.items()]
    inputs, offsets, kernel, *mask = tensors

    def run() -> Any:
        out = torch_deform_conv2d(inputs, offsets, kernel, None, 1, 1, 1, *mask)
        return context.torch.autograd.grad((out**2).sum(), tensors) if backward else out

    return run
