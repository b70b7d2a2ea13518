"""The complete network for comparisons: its arithmetic, and the same network in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.model import AlignPS, Params
from alignps_jax.types import Batch
from alignps_jax.weights.released_names import released_name, to_torch
from configs import tiny
from tests.benchmark.measure import Context, plain_conv


def configured(context: Context, **model: Any) -> ConfigDict:
    """The configuration (in a quick run that of a tiny network) with changes of `model`."""
    if not context.quick:
        config = ConfigDict(context.config.to_dict())
    else:
        config = tiny.get_config()
        if context.torch is not None:  # whose network has no other backbone
            config.model.backbone, config.model.frozen_stages = "resnet50", 1
    config.model.update(model)
    return config


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within it networks are traced with XLA's own convolutions, the deformable ones included.

    `program_cost` of it is then what no implementation can do without: neither interpolation, nor
    what a backward pass computes a second time. Flax asks the interceptor before each call of a
    module; parameters stay those of the network.
    """
    with nn.intercept_methods(_as_plain_convolution):
        yield


def _as_plain_convolution(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if context.method_name != "__call__" or module.is_initializing():
        return call(*args, **kwargs)
    if isinstance(module, DeformConv):
        return _not_displaced(module, *args)
    if isinstance(module, nn.Conv):
        return _plain(module, *args)
    return call(*args, **kwargs)


def _plain(module: nn.Conv, inputs: jax.Array) -> jax.Array:
    params, inputs = module.variables["params"], inputs.astype(module.dtype)
    kernel = params["kernel"].astype(module.dtype)
    # The module's convolution knows its stride, the module itself does not.
    height = jax.eval_shape(module.conv_general_dilated, inputs, kernel).shape[1]
    out = plain_conv(inputs, kernel, stride=round(inputs.shape[1] / height))
    return out + params["bias"].astype(module.dtype) if module.use_bias else out


def _not_displaced(module: DeformConv, inputs: jax.Array) -> jax.Array:
    """A plain convolution that still needs offsets and mask, hence their gradients."""
    dtype, stride = module.dtype, module.stride
    params, inputs = module.variables["params"], inputs.astype(dtype)
    offset = jax.tree.map(lambda leaf: leaf.astype(dtype), params["offset"])
    predicted = plain_conv(inputs, offset["kernel"], stride=stride) + offset["bias"]
    offsets, mask = module.split(predicted.astype(jnp.float32))
    displaced = offsets.sum((3, 4)) if mask is None else offsets.sum((3, 4)) + mask.sum(3)
    out = plain_conv(inputs, params["kernel"].astype(dtype), stride=stride)
    out += displaced[..., None].astype(dtype)
    return out + params["bias"].astype(dtype) if module.use_bias else out


def torch_network(context: Context, config: ConfigDict, params: Params, frozen: Params) -> Any:
    """The network in PyTorch with our weights, without the levels that ours lacks."""
    # Only here, as PyTorch need not be installed.
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
