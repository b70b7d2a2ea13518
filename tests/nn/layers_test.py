"""Layers that look at the valid region only."""

import jax.numpy as jnp
import numpy as np

from alignps_jax.nn.layers import subtract_mean


def test_the_mean_of_a_bfloat16_map_is_subtracted_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(30.3, 0.5, (2, 12, 20, 16)), jnp.bfloat16)
    found = subtract_mean(x, np.array([[12, 20], [12, 20]], np.int32))
    exact = np.asarray(x, np.float64)
    exact -= exact.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found, exact, atol=1e-5)
