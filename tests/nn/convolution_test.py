"""Plain convolutions against XLA's own, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alignps_jax.nn.convolution import conv2d


def xla_conv(x, kernel, stride=1):
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "features"),
    # The last three have few outputs, for which there is another rule.
    [
        *(((2, 6, 9, 3), 5), ((1, 1, 4, 2), 5), ((3, 7, 1, 4), 5)),
        *(((2, 6, 9, 40), 3), ((1, 1, 4, 13), 1), ((3, 7, 1, 50), 4)),
    ],
)
def test_values_and_gradients_are_those_of_xla(size, stride, shape, features):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, shape[-1], features)), jnp.float32)
    kernel /= size * shape[-1] ** 0.5

    def both(conv):
        out, pull = jax.vjp(conv, x, kernel)
        return out, pull(jnp.sin(3 * out))

    found = jax.jit(lambda: both(lambda x, k: conv2d(x, k, stride=stride)))()
    expected = jax.jit(lambda: both(lambda x, k: xla_conv(x, k, stride)))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


# 3 channels in, or so many that 2 out are few.
@pytest.mark.parametrize("channels", [3, 24])
def test_bfloat16_sums_in_float32(channels):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 40, 40, channels)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, 2)), jnp.bfloat16)

    def gradient(dtype):
        x_, kernel_ = x.astype(dtype), kernel.astype(dtype)
        return jax.grad(lambda k: (conv2d(x_, k) * 0.5).sum().astype(jnp.float32))(kernel_)

    # Rounded once, at the end, to the 8 bits of bfloat16.
    out = conv2d(x, kernel)
    exact = conv2d(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=2**-8, atol=1e-4)

    found, expected = gradient(jnp.bfloat16), gradient(jnp.float32)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.01, atol=0.5)
