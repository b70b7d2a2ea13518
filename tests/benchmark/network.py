"""Inference and the training step, each beside the released ones in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark import (
    Case,
    Row,
    cases,
    make_program,
    peak_memory,
    plausible_weights,
)
from alignps_jax.nn.model import build_model
from alignps_jax.types import Batch
from configs import cuhk
from tests.benchmark.measure import Context
from tests.parity.ours import by_released_name


def inference_rows(context: Context) -> Iterator[Row]:
    """A photo of 1500×900, AlignPS and AlignPS+; every location is a candidate of suppression."""
    for name, variant in {"AlignPS": "", "AlignPS+": "plus"}.items():
        config = cuhk.get_config(variant)
        config.eval.min_cls_score = 0.0
        case = cases(config, "inference", 1)[0]
        yield row(context, f"{name}, {case}", config, case)


def train_rows(context: Context) -> Iterator[Row]:
    """The step on two images of 1000×600."""
    config = cuhk.get_config()
    config.data.train_scales = ((1000, 600),)
    case = cases(config, "train", 2)[0]
    yield row(context, str(case), config, case)


def row(context: Context, what: str, config: ConfigDict, case: Case) -> Row:
    """Our step on one device, in turns with PyTorch's on the same images."""
    devices = jax.devices()[:1]
    program = make_program(config, case, devices)
    functions = {"ours": program.runner(devices)}
    functions |= context.with_torch(partial(torch_step, context, config, case, program.batch))
    return context.row(what, functions, **{"memory, GB": peak_memory(program.compiled)})


def torch_step(
    context: Context, config: ConfigDict, case: Case, batch: Batch
) -> Callable[[], object]:
    """The released step with our weights: of training, or the detections of the first photo."""
    # Only here, as PyTorch need not be installed.
    from tests.oracle.alignps_torch import AlignPS, Spec, detect
    from tests.oracle.training_torch import Trainer
    from tests.parity.common import scene_for_oracle

    class OneLevel(AlignPS):
        """In training as well, P3 only, as ours."""

        def forward(self, pixels, train=False):
            return super().forward(pixels)

    network = OneLevel(Spec(tuple(config.model.deform_stages)))
    params, frozen = plausible_weights(build_model(config))
    ours = by_released_name({"params": params, "frozen": frozen})
    tensors = {name: context.torch.tensor(np.ascontiguousarray(x)) for name, x in ours.items()}
    network.load_state_dict(tensors, strict=False)
    network.to(context.torch_device).train(case.step == "train")
    pixels, people = scene_for_oracle(batch)
    pixels = pixels.to(context.torch_device)
    if case.step == "train":
        decay = config.optimizer.weight_decay
        trainer = Trainer(network, weight_decay=decay, warmup=300, drops=())
        people = [tuple(x.to(context.torch_device) for x in each) for each in people]
        return partial(trainer.step, pixels, people)

    def run() -> object:
        with context.torch.no_grad():
            outputs, _ = network(pixels)
            return detect(outputs[0], case.size, (1.0, 1.0))

    return run
