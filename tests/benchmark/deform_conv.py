"""Deformable convolution at the shapes of the paper's network, beside torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
    for name, shape in LAYERS.items():
        shape = (8, 4, 6, 7) if context.quick else shape
        arrays = random_arrays(*shape, modulated="modulated" in name)
        for backward in (False, True):
            function, arguments = our_work(arrays, backward)
            program = jax.jit(function).lower(*arguments).compile()
            functions = {"ours": partial(program, *arguments)}
            functions |= context.with_torch(partial(torch_work, context, arrays, backward))
            channels, features, height, width = shape
            what = f"{name} {channels}→{features} at {height}×{width}, "
            what += "forward + backward" if backward else "forward"
            yield context.row(what, functions, **{"memory, GB": peak_memory(program)})


def random_arrays(
    channels: int, features: int, height: int, width: int, modulated: bool
) -> dict[str, np.ndarray]:
    """Arguments of `deform_conv2d` and a cotangent of its result; offsets of a few pixels."""
    rng, place = np.random.default_rng(0), (1, height, width)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "inputs": normal(*place, channels),
        "offsets": 2 * normal(*place, 9, 2),
        "kernel": normal(3, 3, channels, features) / (9 * channels) ** 0.5,
    }
    if modulated:
        arrays["mask"] = rng.uniform(size=(*place, 9)).astype(np.float32)
    return arrays | {"cotangent": normal(*place, features)}


def our_work(
    arrays: dict[str, np.ndarray], backward: bool
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """The function to time, and its arguments."""
    *names, _ = arrays
    *arguments, cotangent = (jnp.asarray(array) for array in arrays.values())

    def forward(*values: jax.Array) -> jax.Array:
        return deform_conv2d(**dict(zip(names, values, strict=True)))

    def forward_backward(cotangent: jax.Array, *values: jax.Array) -> Any:
        out, pull = jax.vjp(forward, *values)
        return out, pull(cotangent)

    return (forward_backward, [cotangent, *arguments]) if backward else (forward, arguments)


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
        return found.requires_grad_(backward and name != "cotangent")

    tensors = {name: tensor(name, array) for name, array in arrays.items()}
    cotangent, mask = tensors.pop("cotangent"), tensors.get("mask")
    arguments = [tensors[name] for name in ("inputs", "offsets", "kernel")]

    def run() -> Any:
        out = torch_deform_conv2d(*arguments, padding=1, mask=mask)
        return (
            context.torch.autograd.grad(out, list(tensors.values()), cotangent) if backward else out
        )

    return run
