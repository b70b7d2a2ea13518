"""Plain convolutions with quick gradients in their weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from alignps_jax.nn.platforms import on_platform

Map = Float[Array, "B H W C"]
Kernel = Float[Array, "k k C F"]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_LANES = 128  # of a TPU's vectors
# Of bfloat16 too, sums in float32.
matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def conv2d(inputs: Map, kernel: Kernel, *, stride: int = 1) -> Float[Array, "B h w F"]:
    """A convolution with an odd square kernel and `k // 2` zeros around the map, as in PyTorch.

    XLA's gradients on CPUs are 4 times slower than those of a matmul for 1x1 kernels, 2 to 20
    times slower than those by taps for few outputs, and 1.2 times slower for other kernels.
    """
    side, _, channels, features = kernel.shape
    if side == 1:
        # XLA's Triton code finds no tiles for the matmuls of large maps (A100, float32), and
        # aborts where it meets a stride.
        inputs = inputs[:, ::stride, ::stride]
        return on_platform(inputs, kernel, cuda=_plain_conv, default=_product)
    if stride > 1:
        return _plain_conv(inputs, kernel, stride)
    if side**2 * features <= 2 * channels:
        # The projections for all taps take at most twice the memory of the map; on TPUs, to shift
        # parts of vectors is slow.
        on_tpu = _by_taps if side**2 * features <= _LANES else _conv
        return on_platform(inputs, kernel, cuda=_plain_conv, tpu=on_tpu, default=_by_taps)
    return _conv(inputs, kernel)


def _plain_conv(inputs: Map, kernel: Kernel, stride: int = 1) -> Float[Array, "B h w F"]:
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def _product(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    out = inputs.reshape(-1, inputs.shape[-1]) @ kernel[0, 0]
    return out.reshape(*inputs.shape[:3], -1)


def _by_taps(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    """Projects every pixel for all taps at once; each location then adds up what meets there.

    Maps keep their four dimensions: on a TPU, few columns are laid out along the rows of the map,
    and to join these takes long, unless they are a multiple of 128.
    """
    side, _, channels, _ = kernel.shape
    rows = kernel.swapaxes(2, 3).reshape(-1, channels)
    projected = jnp.einsum("bhwc,pc->bhwp", inputs, rows, preferred_element_type=jnp.float32)
    taps = enumerate(jnp.split(projected, side**2, axis=-1))
    # Each tap's projection is as far from its location as the tap is from the middle.
    middle = side // 2
    total: Any = sum(shifted(tap, middle - at // side, middle - at % side) for at, tap in taps)
    return total.astype(inputs.dtype)


def shifted(x: Float[Array, "B H W F"], down: int, right: int) -> Float[Array, "B H W F"]:
    """The map moved by that many pixels, zeros where nothing comes from."""
    edges = [(0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0)]
    return lax.pad(x, np.zeros((), x.dtype), edges)


def conv_by_rows(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    """`_plain_conv` as a sum of convolutions along the rows, every row an image of its own.

    A TPU's compiler cuts few images into strips, and copies them back and forth. Gradients do
    without it: they would take several times as long to compile.
    """
    side, (batch, height, width, channels) = kernel.shape[0], inputs.shape
    rows = inputs.reshape(-1, width, channels)
    total = jnp.zeros((batch, height, width, kernel.shape[-1]))
    for row in range(side):
        found = lax.conv_general_dilated(
            rows,
            kernel[row],
            (1,),
            [(side // 2, side // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.float32,
        )
        total += shifted(found.reshape(total.shape), side // 2 - row, 0)
    return total.astype(inputs.dtype)


@jax.custom_vjp
def _conv(inputs: Map, kernel: Kernel) -> Float[Array, "B H W F"]:
    return on_platform(inputs, kernel, tpu=conv_by_rows, default=_plain_conv)


def _conv_bwd(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    # XLA's own rule reverses the kernel too, but inside a branch its CPU compiler then misses it.
    d_inputs = _plain_conv(d_out, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))

    def plain(inputs: Array, d_out: Array) -> Array:
        return jax.linear_transpose(lambda k: _plain_conv(inputs, k), kernel)(d_out)[0]

    by_taps = partial(_kernel_gradient, side=kernel.shape[0])
    return d_inputs, on_platform(inputs, d_out, cpu=by_taps, default=plain)


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
    d_out = d_out[: len(d_out) - margin * row - margin]
    # Transposed once for all taps.
    columns = inputs.reshape(-1, channels).T

    def tap(shift: Array) -> Array:
        return matmul(lax.dynamic_slice_in_dim(columns, shift, len(d_out), axis=1), d_out)

    gradient = lax.map(tap, (jnp.arange(side)[:, None] * row + jnp.arange(side)).ravel())
    return gradient.reshape(side, side, channels, features).astype(inputs.dtype)
