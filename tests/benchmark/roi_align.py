"""RoIAlign on C4 of one photo of 1500×900, forward and backward, beside torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from alignps_jax.experiments.benchmark import Row, peak_memory
from alignps_jax.nn.roi import roi_align
from tests.benchmark.measure import Context

MAP, REGIONS = (57, 94, 1024), 128


def rows(context: Context) -> Iterator[Row]:
    """The output and the map's gradient, for regions of people's sizes and shapes."""
    arrays = random_arrays()
    program = jax.jit(both).lower(*arrays).compile()
    functions = {"ours": partial(program, *jax.device_put(arrays))}
    functions |= context.with_torch(partial(torch_work, context, *arrays))
    what = f"{REGIONS} regions of {'×'.join(map(str, MAP))}, forward + backward"
    yield context.row(what, functions, **{"memory, GB": peak_memory(program)})


def random_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map, boxes, and the gradient of the output."""
    rng = np.random.default_rng(0)
    height = rng.uniform(60, 600, (REGIONS, 1))
    sides = np.concatenate([height * rng.uniform(0.3, 0.5, (REGIONS, 1)), height], axis=1)
    corner = rng.uniform(0, np.maximum(np.multiply(16, MAP[1::-1]) - sides, 1))
    boxes = np.concatenate([corner, corner + sides], axis=1)
    d_out = rng.normal(size=(REGIONS, 14, 14, MAP[2]))
    return tuple(x.astype(np.float32) for x in (rng.normal(size=MAP), boxes, d_out))


def both(c4: jax.Array, boxes: jax.Array, d_out: jax.Array) -> Any:
    """The output and the gradient of the map."""
    size = np.array(MAP[:2], np.int32)
    out, pull = jax.vjp(lambda c4: roi_align(c4, boxes, size), c4)
    return out, pull(d_out)


def torch_work(
    context: Context, c4: np.ndarray, boxes: np.ndarray, d_out: np.ndarray
) -> Callable[[], object]:
    """The same by `torchvision.ops.roi_align`, in its own layout."""
    from torchvision.ops import roi_align as torch_roi_align

    def tensor(array: np.ndarray) -> Any:
        return context.torch.tensor(np.ascontiguousarray(array), device=context.torch_device)

    features = tensor(c4.transpose(2, 0, 1)[None]).requires_grad_()
    regions, gradient = [tensor(boxes)], tensor(d_out.transpose(0, 3, 1, 2))

    def run() -> Any:
        out = torch_roi_align(features, regions, 14, 1 / 16, sampling_ratio=0, aligned=True)
        return out, context.torch.autograd.grad(out, features, gradient)

    return run
