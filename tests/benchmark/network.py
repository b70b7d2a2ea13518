"""Inference and the training step, each beside the released ones in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.experiments.benchmark import (
    IDENTITIES,
    Case,
    Row,
    cases,
    make_program,
    peak_memory,
    plausible_weights,
)
from alignps_jax.nn.model import build_model
from alignps_jax.types import Batch
from configs import cuhk, tiny
from tests.benchmark.measure import Context
from tests.parity.ours import by_released_name


def inference_rows(context: Context) -> Iterator[Row]:
    """A photo of 1500×900, AlignPS and AlignPS+; every location is a candidate of suppression."""
    for name, variant in {"AlignPS": "", "AlignPS+": "plus"}.items():
        config = configured(context, variant)
        config.eval.min_cls_score = 0.0
        case = cases(config, "inference", 1)[0]
        yield row(context, f"{name}, {case}", config, case, torch_inference)


def train_rows(context: Context) -> Iterator[Row]:
    """The step on two images of 1000×600."""
    config = configured(context)
    config.data.train_scales = config.data.train_scales[:1] if context.quick else ((1000, 600),)
    case = cases(config, "train", 2)[0]
    yield row(context, str(case), config, case, torch_train)


def configured(context: Context, variant: str = "") -> ConfigDict:
    """The configuration; in a quick run that of a tiny network, with PyTorch's only backbone."""
    config = (tiny if context.quick else cuhk).get_config(variant)
    config.loss.lut_size = IDENTITIES
    if context.quick:
        config.model.backbone, config.model.frozen_stages = "resnet50", 1
    return config


def row(
    context: Context,
    what: str,
    config: ConfigDict,
    case: Case,
    torch: Callable[[Context, ConfigDict, Batch], Callable[[], object]],
) -> Row:
    """Our step on one device, in turns with PyTorch's on the same images."""
    devices = jax.devices()[:1]
    program = make_program(config, case, devices)
    functions = {"ours": program.runner(devices)}
    functions |= context.with_torch(lambda: torch(context, config, program.batch))
    return context.row(what, functions, **{"memory, GB": peak_memory(program.compiled)})


def torch_inference(context: Context, config: ConfigDict, batch: Batch) -> Callable[[], object]:
    """PyTorch's network, decoding and suppression of the first photo."""
    from tests.oracle.alignps_torch import detect as torch_detect

    network, pixels = torch_network(context, config).eval(), torch_pixels(context, config, batch)
    size = tuple(int(side) for side in batch.size[0])

    def run() -> object:
        with context.torch.no_grad():
            outputs, _ = network(pixels)
            return torch_detect(outputs[0], size, (1.0, 1.0))

    return run


def torch_train(context: Context, config: ConfigDict, batch: Batch) -> Callable[[], object]:
    """The released training step on the same images and people, P3 only."""
    from tests.oracle.training_torch import Trainer

    network = torch_network(context, config).train()
    trainer = Trainer(network, weight_decay=config.optimizer.weight_decay, warmup=300, drops=())
    identity = np.where(batch.labeled, batch.identity, -1)
    people = [
        tuple(context.torch.tensor(x, device=context.torch_device) for x in of_image)
        for of_image in zip(batch.boxes, identity, strict=True)
    ]
    return partial(trainer.step, torch_pixels(context, config, batch), people)


def torch_network(context: Context, config: ConfigDict) -> Any:
    """The network in PyTorch with our weights, without the levels that ours lacks."""
    # Only here, as PyTorch need not be installed.
    from tests.oracle.alignps_torch import AlignPS as TorchAlignPS
    from tests.oracle.alignps_torch import Spec

    class OneLevel(TorchAlignPS):
        """In training as well, P3 only."""

        def forward(self, pixels: Any, train: bool = False) -> Any:
            return super().forward(pixels, train=False)

    spec = Spec(
        deform_stages=tuple(config.model.deform_stages),
        lut_size=config.loss.lut_size,
        queue_size=config.loss.queue_size,
        width=config.model.backbone_width,
        channels=config.model.channels,
        groups=config.model.norm_groups,
    )
    network = OneLevel(spec)
    params, frozen = plausible_weights(build_model(config))
    ours = by_released_name({"params": params, "frozen": frozen})
    tensors = {name: context.torch.tensor(np.ascontiguousarray(x)) for name, x in ours.items()}
    network.load_state_dict(tensors, strict=False)
    return network.to(context.torch_device)


def torch_pixels(context: Context, config: ConfigDict, batch: Batch) -> Any:
    """The images of a batch as PyTorch's network takes them: [B, 3, H, W], mean-free."""
    pixels = np.asarray(batch.image, np.float32)
    if config.model.channel_order == "BGR":
        pixels = pixels[..., ::-1]
    pixels = (pixels - np.float32(config.model.pixel_mean)) / np.float32(config.model.pixel_std)
    nchw = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return context.torch.tensor(nchw, device=context.torch_device)
