"""What TPUs compute in another way, on a CPU: stem by blocks, convolutions by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignps_jax.nn.backbone import stem_by_blocks
from alignps_jax.nn.convolution import conv_by_rows
from alignps_jax.nn.layers import mask_padding
from tests.nn.convolution_test import xla_conv


def stem_in_float64(image, kernel, factor, shift, valid_size):
    """Convolution, factor and shift, zeros outside, and the maximum of 3x3 windows, literally."""
    image, kernel = (np.asarray(x, np.float64) for x in (image, kernel))
    batch, height, width, _ = image.shape
    padded = np.pad(image, [(0, 0), (3, 3), (3, 3), (0, 0)])
    x = np.zeros((batch, height // 2, width // 2, kernel.shape[-1]))
    for row, column in np.ndindex(7, 7):
        part = padded[:, row : row + height : 2, column : column + width : 2]
        x += part @ kernel[row, column]
    x = np.maximum(x * factor + shift, 0)
    for image, (high, wide) in zip(x, valid_size // 2, strict=True):
        image[high:], image[:, wide:] = 0, 0
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    parts = [
        padded[:, row : row + height // 2 : 2, column : column + width // 2 : 2]
        for row, column in np.ndindex(3, 3)
    ]
    return np.max(parts, axis=0)


def test_the_stem_by_blocks():
    rng = np.random.default_rng(0)
    valid_size = np.array([[64, 96], [32, 64]], np.int32)
    image = mask_padding(jnp.asarray(rng.normal(size=(2, 64, 96, 3)), jnp.float32), valid_size)
    kernel = rng.normal(size=(7, 7, 3, 5)).astype(np.float32)
    factor, shift = rng.normal(size=(2, 5)).astype(np.float32)
    found = jax.jit(stem_by_blocks)((factor, shift), valid_size, image, kernel)
    expected = stem_in_float64(image, kernel, factor, shift, valid_size)
    expected = mask_padding(jnp.asarray(expected), valid_size // 4)
    assert expected.max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    low = image.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    low = stem_by_blocks((factor, shift), valid_size, *low)
    assert low.dtype == jnp.bfloat16
    assert np.abs(np.asarray(low, np.float32) - expected).max() < 0.02 * expected.max()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5), (3, 4, 9)])
@pytest.mark.parametrize("side", [3, 5])
def test_convolutions_by_rows(shape, side):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, 4)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 4, 6)).astype(np.float32)
    weights = rng.normal(size=(*shape, 6)).astype(np.float32)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda *a, c=conv: jnp.sum(nn.tanh(c(*a)) * weights), (0, 1)))(
            x, kernel
        )
        for conv in (conv_by_rows, xla_conv)
    )
    for actual, same in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, same, atol=2e-4)
