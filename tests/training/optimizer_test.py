"""The learning-rate schedule, and SGD with its rules against a literal version."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer, parameter_labels
from configs import cuhk


@pytest.mark.parametrize(("meant_for", "factor"), [(None, 1), (4, 8)])
def test_the_rate_of_the_release_and_with_larger_batches(meant_for, factor):
    config = cuhk.get_config("released").optimizer
    config.scale_with_batch = meant_for
    rate = learning_rate_schedule(config, steps_per_epoch=2801, batch_size=32)
    expected = {0: 1 / 3, 250: 1 / 3 + 2 / 3 * 0.5, 500: 1.0, 16 * 2801 - 1: 1.0}
    expected |= {16 * 2801: 0.1, 22 * 2801: 0.01}
    for step, share in expected.items():
        assert rate(step) == pytest.approx(0.001 * factor * share), step


def test_labels():
    expected = {
        "backbone/conv1/kernel": "frozen",
        "backbone/layer2_0/conv2/kernel": "weight",
        "head/conv3/kernel": "weight",
        "head/conv3/bias": "bias",
        "head/conv3/offset/kernel": "weight",
        "head/conv3/offset/bias": "weight",
        "head/norm3/scale": "weight",
        "head/norm3/bias": "weight",
        "head/scale0": "weight",
    }
    params = traverse_util.unflatten_dict(expected, sep="/")
    labels = parameter_labels(params, lambda path: "conv1" in path)
    assert traverse_util.flatten_dict(labels, sep="/") == expected


@pytest.mark.parametrize("bias_decay", [0.0, 0.02, None])
def test_updates_equal_a_literal_sgd(bias_decay):
    """An unset decay of biases is that of weights."""
    config = cuhk.get_config("released").optimizer
    config.bias_weight_decay = bias_decay
    config.learning_rate, config.clip_norm = 0.1, 2.0
    rate = learning_rate_schedule(config, steps_per_epoch=3)
    optimizer = make_optimizer(config, rate, lambda path: path[0] == "stem")
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2), "bias": (2,)}
    params = {
        name: {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in shapes.items()}
        for name in ("stem", "conv")
    }
    factor = {"kernel": 1.0, "bias": config.bias_lr_factor}
    decay = dict.fromkeys(shapes, config.weight_decay)
    decay |= {} if bias_decay is None else {"bias": bias_decay}
    expected = {leaf: value.astype(np.float64) for leaf, value in params["conv"].items()}
    momentum = {leaf: np.zeros(shape) for leaf, shape in shapes.items()}

    state = optimizer.init(params)
    found = params
    for step in range(60):
        gradient = {leaf: 5 * rng.normal(size=shape) for leaf, shape in shapes.items()}
        zeros = {leaf: np.zeros(shape) for leaf, shape in shapes.items()}
        updates, state = optimizer.update({"stem": zeros, "conv": gradient}, state, found)
        found = optax.apply_updates(found, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for leaf, g in gradient.items():
            g = g * min(1.0, config.clip_norm / norm) + decay[leaf] * expected[leaf]
            momentum[leaf] = 0.9 * momentum[leaf] + g
            expected[leaf] -= float(rate(jnp.asarray(step))) * factor[leaf] * momentum[leaf]
    for leaf in shapes:
        np.testing.assert_allclose(found["conv"][leaf], expected[leaf], rtol=1e-4)
        np.testing.assert_array_equal(found["stem"][leaf], params["stem"][leaf])


def test_adamw_is_that_of_optax():
    config = cuhk.get_config().optimizer
    config.name, config.clip_norm, config.bias_weight_decay = "adamw", 1e9, config.weight_decay
    rules = (
        make_optimizer(config, lambda step: 0.01, lambda path: False),
        optax.adamw(0.01, b1=config.momentum, weight_decay=config.weight_decay),
    )
    results = []
    for rule in rules:
        rng = np.random.default_rng(1)
        params = {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}}
        state = rule.init(params)
        for _ in range(5):
            gradient = {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}}
            updates, state = rule.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params["conv"]["kernel"])
    np.testing.assert_allclose(*results, rtol=1e-6)
