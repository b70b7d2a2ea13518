"""Inference and the training step, each beside the released ones in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

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
from alignps_jax.losses.rpn import ANCHORS
from alignps_jax.nn.model import build_model
from alignps_jax.types import Batch, RoiDraws
from configs import cuhk
from tests.benchmark.measure import Context
from tests.parity.ours import by_released_name


def inference_rows(context: Context) -> Iterator[Row]:
    """A photo of 1500×900; every location is a candidate of suppression."""
    for name, variant in {"AlignPS": "", "AlignPS+": "plus", "ROI-AlignPS": "roi"}.items():
        config = cuhk.get_config(variant)
        config.eval.min_cls_score = 0.0
        case = cases(config, "inference", 1)[0]
        yield row(context, f"{name}, {case}", config, case)


def train_rows(context: Context) -> Iterator[Row]:
    """The step on two images of 1000×600."""
    for name, variant in {"AlignPS": "", "ROI-AlignPS": "roi"}.items():
        config = cuhk.get_config(variant)
        config.data.train_scales = ((1000, 600),)
        case = cases(config, "train", 2)[0]
        yield row(context, f"{name}, {case}", config, case)


def row(context: Context, what: str, config: ConfigDict, case: Case) -> Row:
    """Our step on one device, in turns with PyTorch's on the same images.

    With an RoI branch also in turns with ours without it, which tells the branch's share.
    """
    devices = jax.devices()[:1]
    program = make_program(config, case, devices)
    functions = {"ours": program.runner(devices)}
    if config.model.roi:
        alone = config.copy_and_resolve_references()
        alone.model.roi = False
        functions["without RoI"] = make_program(alone, case, devices).runner(devices)
    functions |= context.with_torch(partial(torch_step, context, config, case, program.batch))
    return context.row(what, functions, **{"memory, GB": peak_memory(program.compiled)})


def torch_step(
    context: Context, config: ConfigDict, case: Case, batch: Batch
) -> Callable[[], object]:
    """The released step with our weights: of training, or the detections of the first photo."""
    # Only here, as PyTorch need not be installed.
    from tests.oracle import roi_torch
    from tests.oracle.alignps_torch import AlignPS, Spec, detect
    from tests.oracle.training_torch import Trainer
    from tests.parity.common import scene_for_oracle

    class OneLevel(AlignPS):
        """In training as well, P3 only, as ours."""

        def forward(self, pixels, train=False):
            return super().forward(pixels)

    roi = config.model.roi
    network: AlignPS = OneLevel(Spec(tuple(config.model.deform_stages)))
    network = roi_torch.ROIAlignPS(roi_torch.roi_spec_of("cuhk")) if roi else network
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
        if roi:
            sizes = [tuple(size) for size in batch.size.tolist()]
            turn = roi_torch.TrainingBatch(pixels, people, sizes, random_draws(batch, network.spec))
            return partial(next, roi_torch.train(network, itertools.repeat(turn)))
        return partial(trainer.step, pixels, people)
    context.torch.nn.init.zeros_(network.bbox_head.conv_cls.bias)  # all reach the threshold

    def run() -> object:
        if roi:
            return roi_torch.detect_with_rois(network, pixels, case.size, (1.0, 1.0))
        with context.torch.no_grad():
            outputs, _ = network(pixels)
            return detect(outputs[0], case.size, (1.0, 1.0))

    return run


def random_draws(batch: Batch, spec: Any) -> RoiDraws:
    """Random choices of the RoI branch for the images of a batch."""
    rng, (images, people) = np.random.default_rng(0), batch.valid.shape
    height, width = batch.image.shape[1:3]
    shapes = (height // 16 * (width // 16) * ANCHORS,), (people + spec.proposals,)
    rpn, roi = (rng.random((images, *shape), np.float32) for shape in shapes)
    return RoiDraws(rpn, roi, np.float32(0.5), rng.random(images * spec.rois, np.float32))
