"""The whole network for benchmarks: weights, arithmetic, and the same network in PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.benchmark.measure import Context, plain_conv
from alignps_jax.nn.model import AlignPS, Params, init_variables
from alignps_jax.types import Batch
from alignps_jax.weights.released_names import released_name, to_torch
from configs import tiny

# Random weights under which the activations of a ResNet-50 keep a sane size, and offsets are of
# one or two pixels, as trained ones are: what is read from memory depends on it. Factors.
_STEM_FACTOR, _RESIDUAL_FACTOR = 1 / 16, 1 / 4


def configured(context: Context, **model: Any) -> ConfigDict:
    """The configuration (in a quick run that of a tiny network) with changes of `model`."""
    if not context.quick:
        config = ConfigDict(context.config.to_dict())
    else:
        config = tiny.get_config()
        if has_oracle(context):  # which has no other backbone
            config.model.backbone, config.model.frozen_stages = "resnet50", 1
    config.model.update(model)
    return config


def sane_weights(model: AlignPS) -> tuple[Params, Params]:
    """(params, frozen) of a network that was not trained, but behaves as if it were."""
    params, frozen = init_variables(model, jax.random.key(0))
    stem = params["backbone"]["conv1"]
    stem["kernel"] = stem["kernel"] * _STEM_FACTOR
    flat = traverse_util.flatten_dict(frozen)
    factors = {path: _RESIDUAL_FACTOR for path in flat if path[-2:] == ("bn3", "scale")}
    flat = {path: leaf * factors.get(path, 1.0) for path, leaf in flat.items()}
    return params, traverse_util.unflatten_dict(flat)


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within it the network is traced with XLA's own convolutions, the deformable ones included.

    `program_cost` of it is then what no implementation can do without: neither interpolation, nor
    what a backward pass computes a second time.
    """
    with (
        mock.patch("alignps_jax.nn.deform_conv.deform_conv2d", _not_displaced),
        mock.patch("alignps_jax.nn.layers.conv2d", plain_conv),
    ):
        yield


def _not_displaced(
    inputs: jax.Array,
    offsets: jax.Array,
    kernel: jax.Array,
    mask: jax.Array | None = None,
    *,
    stride: int = 1,
) -> jax.Array:
    """A plain convolution that still needs offsets and mask, hence their gradients."""
    out = plain_conv(inputs, kernel.astype(inputs.dtype), stride=stride)
    displaced = offsets.sum((3, 4)) if mask is None else offsets.sum((3, 4)) + mask.sum(3)
    return out + displaced[..., None].astype(out.dtype)


def has_oracle(context: Context) -> bool:
    """Whether PyTorch and the network in it that the tests compare ours with are at hand."""
    return context.torch is not None and importlib.util.find_spec("tests") is not None


def no_torch_note(context: Context) -> str:
    """Why there are no figures of PyTorch, or ""."""
    if context.torch is None:
        return "torch: not installed"
    return "" if has_oracle(context) else "torch: tests/oracle is not there"


def torch_network(context: Context, config: ConfigDict, params: Params, frozen: Params) -> Any:
    """The network in PyTorch with our weights, without the levels that ours lacks."""
    from tests.oracle.alignps_torch import AlignPS as TorchAlignPS
    from tests.oracle.alignps_torch import Spec

    spec = Spec(
        deform_stages=tuple(config.model.deform_stages),
        lut_size=config.loss.lut_size,
        queue_size=config.loss.queue_size,
        width=config.model.backbone_width,
        channels=config.model.channels,
        groups=config.model.norm_groups,
    )

    class OneLevel(TorchAlignPS):
        """In training as well, P3 only."""

        def forward(self, pixels: Any, train: bool = False) -> Any:
            return super().forward(pixels, train=False)

    network = OneLevel(spec)
    ours = traverse_util.flatten_dict({"params": params, "frozen": frozen}, sep="/")
    tensors = {
        released_name(path): context.torch.tensor(np.ascontiguousarray(to_torch(np.asarray(leaf))))
        for path, leaf in ours.items()
    }
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


def forward(model: AlignPS, params: Params, frozen: Params, batch: Batch, *, train: bool) -> Any:
    """The outputs of all levels."""
    return model.apply({"params": params, "frozen": frozen}, batch.image, batch.size, train=train)


def on_device(tree: Any) -> Any:
    """A copy on the device, so that no run pays for the way there."""
    return jax.device_put(jax.tree.map(jnp.asarray, tree))


def compiled(function: Any, *args: Any) -> tuple[jax.stages.Compiled, partial]:
    """A compiled program, and a call of it with these arguments."""
    program = jax.jit(function).lower(*args).compile()
    return program, partial(program, *args)
