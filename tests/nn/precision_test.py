"""Which products accelerators may round, and which stay float32."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.devices import AXIS
from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.deform_conv import DeformConv
from alignps_jax.nn.layers import minus_mean
from configs import tiny
from tests.fakes import random_batch, train_setup
from tests.nn.model_test import tiny_model


def precisions(program):
    """How often each precision stands in a lowered program's products and convolutions."""
    return Counter(re.findall(r"precision(?:_config)? = \[.*?(DEFAULT|HIGHEST)", program.as_text()))


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_inference_multiplies_as_configured(precision):
    config, model, params, frozen = tiny_model()
    config.eval.precision = precision
    batch = random_batch(np.random.default_rng(0), images=1)
    found = precisions(jax.jit(PredictStep(model, config.eval)).lower(params, frozen, batch))
    asked, other = ("HIGHEST", "DEFAULT") if precision == "highest" else ("DEFAULT", "HIGHEST")
    assert found[asked] > 20
    assert found[other] == 0


def test_offsets_of_a_bfloat16_network_are_float32():
    module = DeformConv(4, dtype=jnp.bfloat16)
    inputs = jnp.ones((1, 5, 6, 3), jnp.bfloat16)
    variables = module.init(jax.random.key(0), inputs)
    variables["params"]["offset"]["bias"] += 20.03
    _, captured = module.apply(variables, inputs, capture_intermediates=True)
    offsets = captured["intermediates"]["offset"]["__call__"][0]
    assert offsets.dtype == jnp.float32
    np.testing.assert_allclose(offsets, 20.03, rtol=1e-6)


def test_training_multiplies_as_configured_and_gradients_too():
    _, step, state = train_setup(tiny.get_config(), devices=1)
    batch = jax.tree.map(lambda x: x[None], random_batch(np.random.default_rng(0)))

    def found(precision):
        one = dataclasses.replace(step, precision=precision)
        on_axis = jax.vmap(one, axis_name=AXIS, in_axes=(None, 0), out_axes=None, axis_size=1)
        return precisions(jax.jit(on_axis).lower(state, batch))

    fast, exact = found("default"), found("highest")
    assert 0 < fast["HIGHEST"] < 20 < fast["DEFAULT"]  # the losses' similarities
    assert exact["HIGHEST"] == fast["HIGHEST"] + fast["DEFAULT"]
    assert exact["DEFAULT"] == 0


def test_the_mean_of_a_bfloat16_map_is_subtracted_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(30.3, 0.5, (2, 12, 20, 16)), jnp.bfloat16)
    found = minus_mean(x, np.array([[12, 20], [12, 20]], np.int32))
    exact = np.asarray(x, np.float64)
    exact -= exact.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found, exact, atol=1e-5)
