"""Plain convolutions with quick gradients in their weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Map = Float[Array, "B H W C"]
Kernel = Float[Array, "k k C F"]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_LANES = 128  # of a TPU's vectors
# Of bfloat16 too, sums in float32.
matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def conv2d(inputs: Map, kernel: Kernel, *, stride: int = 1) -> Float[Array, "B h w F"]:
    """A convolution with an odd square kernel and `k // 2` zeros around the map, as in PyTorch.

    On CPUs, stride-1 convolutions larger than 1x1 use a kernel gradient of their own, because XLA's
    transposes batch and channels and is 1.5 to 2 times slower. 1x1 convolutions are matrix
    products but on NVIDIA's GPUs, because XLA's gradient of them is 3 to 20 times slower on CPUs.
    Convolutions with few outputs (offsets, scores, boxes) are made by taps. A 3x3 stem
    takes a fourth channel on CPUs.
    """
    side, _, channels, features = kernel.shape
    if side == 1:
        inputs = inputs[:, ::stride, ::stride]
        # XLA's Triton code finds no tiles for the matmuls of large maps (A100, float32), and
        # aborts where it meets a stride.
        ways = {"cuda": _plain_conv, "default": _product}
    elif stride == 1 and side**2 * features <= 2 * channels:
        # The projections for all taps take at most twice the memory of the map; on TPUs, to shift
        # parts of vectors is slow.
        on_tpu = _by_taps if side**2 * features <= _LANES else _conv
        ways = {"cuda": _plain_conv, "tpu": on_tpu, "default": _by_taps}
    elif stride == 1:
        return _conv(inputs, kernel)
    elif kernel.shape[:3] == (3, 3, 3):
        ways = {
            "cpu": partial(_with_fourth_channel, stride=stride),
            "default": partial(_plain_conv, stride=stride),
        }
    else:
        return _plain_conv(inputs, kernel, stride)
    return lax.platform_dependent(inputs, kernel, **ways)


def _plain_conv(inputs: Map, kernel: Kernel, stride: int = 1) -> Float[Array, "B h w F"]:
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def _with_fourth_channel(inputs: Map, kernel: Kernel, stride: int) -> Float[Array, "B h w F"]:
    """The same result with a channel of zeros: XLA's CPU code takes ten times as long for three."""
    inputs = jnp.pad(inputs, [(0, 0), (0, 0), (0, 0), (0, 1)])
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, 1), (0, 0)])
    return _plain_conv(inputs, kernel, stride)


def conv_by_rows(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    """`_plain_conv` as a sum of convolutions along the rows, every row an image of its own.

    A TPU's compiler cuts few images into strips, and copies them back and forth. Gradients do
    without it: they would take several times as long to compile.
    """
    side, (batch, height, width, channels) = kernel.shape[0], inputs.shape
    rows = inputs.reshape(-1, width, channels)
    total = jnp.zeros_like(inputs, dtype=jnp.float32, shape=(*inputs.shape[:3], kernel.shape[-1]))
    for row in range(side):
        found = lax.conv_general_dilated(
            rows,
            kernel[row],
            (1,),
            [(side // 2, side // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.float32,
        )
        total += shifted(found.reshape(batch, height, width, -1), side // 2 - row, 0)
    return total.astype(inputs.dtype)


@jax.custom_vjp
def _conv(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    return lax.platform_dependent(inputs, kernel, tpu=conv_by_rows, default=_plain_conv)


def _conv_bwd(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    # XLA's own rule reverses the kernel too, but inside a branch its CPU compiler then misses it.
    d_inputs = _plain_conv(d_out, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))

    d_kernel = lax.platform_dependent(
        inputs,
        d_out,
        cpu=partial(_kernel_gradient, side=kernel.shape[0]),
        default=lambda x, d: jax.linear_transpose(lambda k: _plain_conv(x, k), kernel)(d)[0],
    )
    return d_inputs, d_kernel


_conv.defvjp(lambda *args: (_plain_conv(*args), args), _conv_bwd)


def _kernel_gradient(inputs: Map, d_out: Float[Array, "B H W F"], side: int) -> Kernel:
    """The gradient in the kernel: for every tap, a product of the shifted map and `d_out`.

    Both maps are padded to the same size and laid out row after row, so that a tap's shift in
    two dimensions is a shift in one.
    """
    channels, features, margin = inputs.shape[-1], d_out.shape[-1], side - 1
    padding = [(0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)]
    inputs = jnp.pad(inputs, padding)
    d_out = jnp.pad(d_out, [(0, 0), (0, margin), (0, margin), (0, 0)]).reshape(-1, features)
    row = inputs.shape[2]
    # What ends with zeros is cut off there, so that no shift leaves the map.
    length = len(d_out) - margin * row - margin
    d_out = d_out[:length]
    # Transposed once for all taps.
    columns = inputs.reshape(-1, channels).T

    def tap(_: None, shift: Array) -> tuple[None, Array]:
        shifted = lax.dynamic_slice_in_dim(columns, shift, length, axis=1)
        return None, matmul(shifted, d_out)

    shifts = (jnp.arange(side)[:, None] * row + jnp.arange(side)).ravel()
    _, gradient = lax.scan(tap, None, shifts)
    return gradient.reshape(side, side, channels, features).astype(inputs.dtype)


def shifted(x: Float[Array, "B H W F"], down: int, right: int) -> Float[Array, "B H W F"]:
    """The map moved by that many pixels, zeros where nothing comes from."""
    edges = [(0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0)]
    return lax.pad(x, np.zeros((), x.dtype), edges)


def _by_taps(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    """Projects every pixel for all taps at once; each location then adds up what meets there.

    One product with k * k * F columns instead of k * k with F, which are too few for it to be fast.
    Maps keep their four dimensions: on a TPU, few columns are laid out along the rows of the map,
    and to join these takes long, to run and to compile, unless they are a multiple of 128.
    """
    side, _, channels, _ = kernel.shape
    rows = kernel.swapaxes(2, 3).reshape(-1, channels)
    projected = jnp.einsum("bhwc,pc->bhwp", inputs, rows, preferred_element_type=jnp.float32)
    taps = enumerate(jnp.split(projected, side**2, axis=-1))
    # Each tap's projection is as far from its location as the tap is from the middle.
    middle = side // 2
    total: Any = sum(shifted(tap, middle - at // side, middle - at % side) for at, tap in taps)
    return total.astype(inputs.dtype)


def _product(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    batch, height, width, channels = inputs.shape
    return (inputs.reshape(-1, channels) @ kernel[0, 0]).reshape(batch, height, width, -1)
