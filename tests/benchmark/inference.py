"""Inference: from a photo's bytes on the device to its detections, AlignPS and AlignPS+."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark.measure import peak_memory, time_in_turns
from alignps_jax.experiments.benchmark.simulate import plausible_weights
from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.model import build_model
from alignps_jax.types import Batch
from data_pipeline.transforms import Size, buckets
from tests.benchmark.growth_cases import made_up_batch
from tests.benchmark.measure import Context, Row, program_cost
from tests.benchmark.network import (
    compiled,
    configured,
    forward,
    on_device,
    plain_arithmetic,
    torch_network,
    torch_pixels,
)

SCALE = (1500, 900)
BATCH = 4
GOAL = "≥ 2.5× PyTorch, ≤ 1.3× floor"
NETWORKS = {"AlignPS": (), "AlignPS+": (3, 4, 5)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the images and of the large batch."""

    size: Size
    batch: int


def rows(context: Context) -> Iterator[Row]:
    """One image and, per image, a batch, with the share of decoding and suppression.

    The images fill their bucket; every location becomes a candidate, so that suppression has all
    the work it can have. The floor is the arithmetic of the network with plain convolutions.
    """
    shape = Shape((64, 96), 2) if context.quick else Shape(min(buckets([SCALE])), BATCH)
    for name, stages in NETWORKS.items():
        config = configured(context, deform_stages=stages)
        config.loss.lut_size = 1
        config.eval.min_cls_score = 0.0
        yield from _rows(context, name, config, shape)


def _rows(context: Context, name: str, config: ConfigDict, shape: Shape) -> Iterator[Row]:
    model = build_model(config)
    weights = on_device(plausible_weights(model))
    one, several = (
        on_device(made_up_batch(shape.size, people=1, images=images)) for images in (1, shape.batch)
    )
    predict = PredictStep(model, config.eval)
    outputs = jax.jit(partial(forward, model, train=False))(*weights, one)
    functions = {
        "one": (program := compiled(predict, *weights, one))[1],
        "decode": compiled(predict.decode, outputs, one)[1],
    }
    if context.torch is not None:
        functions["torch"] = _torch_function(context, config, *weights, one)
    times = time_in_turns(functions, runs=context.runs)
    with plain_arithmetic():
        cost = program_cost(partial(forward, model, train=False), *weights, one)
    share = times["decode"].median / times["one"].median
    yield Row(
        part="inference",
        name=f"{name}, {shape.size[1]}×{shape.size[0]}, batch 1",
        time=times["one"],
        floor=context.rate.floor(cost.flops, config.model.dtype),
        torch=times.get("torch"),
        flops=cost.flops,
        bytes=cost.bytes,
        goal=GOAL,
        note=context.torch_note,
        memory=peak_memory(program[0]),
    )
    yield Row(
        part="inference",
        name=f"{name}, decoding and NMS alone",
        time=times["decode"],
        goal="≤ 2% of inference",
        note=f"{share:.2%} of inference",
    )
    program = compiled(predict, *weights, several)
    # In turns with a single image: the ratio is what counts.
    times = time_in_turns({"one": functions["one"], "batch": program[1]}, runs=context.runs)
    ratio = times["batch"].median / shape.batch / times["one"].median
    yield Row(
        part="inference",
        name=f"{name}, batch {shape.batch}, per image",
        time=times["batch"].divided(shape.batch),
        floor=context.rate.floor(cost.flops, config.model.dtype),
        flops=cost.flops,
        bytes=cost.bytes,
        goal="≤ batch 1",
        note=f"{ratio:.3f}× batch 1; memory: of the batch",
        memory=peak_memory(program[0]),
    )


def _torch_function(
    context: Context, config: ConfigDict, params: object, frozen: object, batch: Batch
) -> Callable[[], object]:
    """The same photo through PyTorch's network, decoding and suppression."""
    from tests.oracle.alignps_torch import detect as torch_detect

    network = torch_network(context, config, params, frozen).eval()
    pixels = torch_pixels(context, config, batch)
    size = tuple(int(side) for side in batch.size[0])

    def run() -> object:
        with context.torch.no_grad():
            outputs, _ = network(pixels)
            return torch_detect(outputs[0], size, (1.0, 1.0))

    return context.finished(run)
