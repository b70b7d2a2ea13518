"""Deformable convolution at the shapes of the paper's network, against torchvision's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignps_jax.experiments.benchmark.measure import Timing, peak_memory, time_in_turns
from alignps_jax.nn.deform_conv import deform_conv2d
from tests.benchmark.measure import Context, Row, plain_conv, program_cost


@dataclasses.dataclass(frozen=True)
class Layer:
    """One deformable 3x3 convolution of the network, for one photo of 1500 x 900."""

    name: str
    channels: int
    features: int
    height: int
    width: int
    modulated: bool = False

    @property
    def title(self) -> str:
        """Name and shape."""
        return f"{self.name} {self.channels}→{self.features} at {self.height}x{self.width}"


LAYERS = (
    Layer("lateral3", 512, 256, 113, 188),
    Layer("lateral4", 1024, 256, 57, 94),
    Layer("lateral5", 2048, 256, 29, 47),
    Layer("output3", 768, 256, 113, 188),
    Layer("tower (v2)", 256, 256, 113, 188, modulated=True),
)
QUICK_LAYERS = (Layer("quick", 8, 4, 6, 7), Layer("quick (v2)", 4, 4, 6, 7, modulated=True))
FORWARD_GOAL = "≤ 1.4x floor, ≥ 5x torchvision"
BACKWARD_GOAL = "≤ 2.2x floor, ≥ 6x torchvision"


def rows(context: Context) -> Iterator[Row]:
    """Forward, then forward and backward (in input, offsets, kernel, mask), of every layer.

    The floor is the arithmetic of a plain convolution of the same shape, whose gradients are those
    in input and kernel.
    """
    for layer in QUICK_LAYERS if context.quick else LAYERS:
        arrays = random_arrays(layer)
        for goal, backward in ((FORWARD_GOAL, False), (BACKWARD_GOAL, True)):
            yield _row(context, layer, arrays, backward, goal)


def random_arrays(layer: Layer) -> dict[str, np.ndarray]:
    """Arguments of `deform_conv2d` and a cotangent of its result; offsets of a few pixels."""
    rng = np.random.default_rng(0)
    place = (1, layer.height, layer.width)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "inputs": normal(*place, layer.channels),
        "offsets": 2 * normal(*place, 9, 2),
        "kernel": normal(3, 3, layer.channels, layer.features) / (9 * layer.channels) ** 0.5,
    }
    if layer.modulated:
        arrays["mask"] = rng.uniform(size=(*place, 9)).astype(np.float32)
    return arrays | {"cotangent": normal(*place, layer.features)}


def _row(
    context: Context, layer: Layer, arrays: dict[str, np.ndarray], backward: bool, goal: str
) -> Row:
    function, arguments = make_work(arrays, backward)
    program = jax.jit(function).lower(*arguments).compile()
    functions = {"ours": functools.partial(program, *arguments)}
    if context.torch is not None:
        functions["torch"] = torch_function(context, arrays, backward)
    times: dict[str, Timing] = time_in_turns(functions, runs=context.runs)
    flops = program_cost(*plain_work(arrays, backward)).flops
    return Row(
        part="deform_conv",
        name=f"{layer.title}, {'forward + backward' if backward else 'forward'}",
        time=times["ours"],
        floor=context.rate.floor(flops),
        torch=times.get("torch"),
        flops=flops,
        bytes=program_cost(function, *arguments).bytes,
        goal=goal,
        memory=peak_memory(program),
    )


def make_work(
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


def plain_work(
    arrays: dict[str, np.ndarray], backward: bool
) -> tuple[Callable[..., Any], Any, ...]:
    """The plain convolution of that shape, and its arguments."""

    def forward_backward(inputs: jax.Array, kernel: jax.Array) -> Any:
        out, pull = jax.vjp(plain_conv, inputs, kernel)
        return out, pull(out)

    return forward_backward if backward else plain_conv, arrays["inputs"], arrays["kernel"]


def torch_function(
    context: Context, arrays: dict[str, np.ndarray], backward: bool
) -> Callable[[], object]:
    """The same work by `torchvision.ops.deform_conv2d`, in its own layout."""
    from torchvision.ops import deform_conv2d as torch_deform_conv2d

    torch = context.torch
    layout = {
        "inputs": lambda x: x.transpose(0, 3, 1, 2),
        "offsets": lambda x: x.reshape(*x.shape[:3], -1).transpose(0, 3, 1, 2),
        "kernel": lambda x: x.transpose(3, 2, 0, 1),
        "mask": lambda x: x.transpose(0, 3, 1, 2),
        "cotangent": lambda x: x.transpose(0, 3, 1, 2),
    }
    tensors = {
        name: torch.tensor(np.ascontiguousarray(layout[name](array)), device=context.torch_device)
        for name, array in arrays.items()
    }
    cotangent = tensors.pop("cotangent")

    def forward() -> Any:
        with torch.no_grad():
            return call()

    def call() -> Any:
        inputs, offsets, kernel = (tensors[name] for name in ("inputs", "offsets", "kernel"))
        return torch_deform_conv2d(inputs, offsets, kernel, padding=1, mask=tensors.get("mask"))

    def forward_backward() -> Any:
        return torch.autograd.grad(call(), list(tensors.values()), cotangent)

    if backward:
        for tensor in tensors.values():
            tensor.requires_grad_()
    return context.finished(forward_backward if backward else forward)
