"""One training step: exact data parallelism, frozen parameters, nobody in the images."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from alignps_jax.train import is_frozen
from alignps_jax.train_step import AXIS, parallel_train_step, replicate
from alignps_jax.types import Batch
from configs import tiny
from tests.fakes import random_batch, train_setup


def split(batch: Batch, devices: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def one_device(step):
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=jax.local_devices()[:1]
    )


@pytest.mark.parametrize("variant", ["", "released", "plus"])
def test_four_devices_with_one_image_equal_one_device_with_four(variant):
    config = tiny.get_config(variant)
    batch = random_batch(np.random.default_rng(1))
    _, step_one, state = train_setup(config, devices=1)
    _, step_four, _ = train_setup(config, devices=4)
    expected, expected_metrics = one_device(step_one)(state, split(batch, 1))
    found, found_metrics = parallel_train_step(step_four)(replicate(state), split(batch, 4))

    assert expected_metrics.positives > 10
    for name, value in expected_metrics.terms.items():
        assert value > 0, name
        assert relative_error(found_metrics.terms[name], value) <= 1e-5, name
    # Without momentum yet, the trace of the optimiser holds the clipped, decayed gradients.
    for found_leaf, leaf in zip(
        jax.tree.leaves((found.params, found.opt_state)),
        jax.tree.leaves((expected.params, expected.opt_state)),
        strict=True,
    ):
        assert relative_error(found_leaf, leaf) <= 1e-5
    assert relative_error(found.memory.lut, expected.memory.lut) <= 1e-5
    assert relative_error(found.memory.queue, expected.memory.queue) <= 1e-5
    assert found.memory.tail == expected.memory.tail
    assert found.memory.tail != state.memory.tail
    assert found.step == expected.step == 1


def test_images_without_people_give_only_a_classification_loss_and_finite_updates():
    config = tiny.get_config()
    batch = random_batch(np.random.default_rng(2))
    batch = batch.replace(valid=np.zeros_like(batch.valid))
    _, step, state = train_setup(config, devices=1)
    after, metrics = one_device(step)(state, split(batch, 1))
    assert metrics.terms["cls"] > 0
    assert metrics.positives == 0
    for name in ("box", "centerness", "oim", "triplet"):
        assert metrics.terms[name] == 0
    for leaf in jax.tree.leaves(after.params):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(after.memory.lut, state.memory.lut)
    np.testing.assert_array_equal(after.memory.queue, state.memory.queue)


def test_frozen_parameters_stay_and_all_others_move():
    config = tiny.get_config()
    config.model.frozen_stages = 1
    model, step, state = train_setup(config, devices=1)
    batch = random_batch(np.random.default_rng(3))
    after, _ = one_device(step)(state, split(batch, 1))
    before = traverse_util.flatten_dict(state.params)
    for path, leaf in traverse_util.flatten_dict(after.params).items():
        same = np.array_equal(leaf, before[path])
        assert same == is_frozen(model, path), path
    frozen = {path[1] for path in before if is_frozen(model, path)}
    assert frozen == {"conv1", "bn1", "layer1_0"}


def test_positives_beyond_the_limit_are_counted():
    config = tiny.get_config()
    batch = random_batch(np.random.default_rng(1))
    _, step, state = train_setup(config, devices=1)
    _, metrics = one_device(step)(state, split(batch, 1))
    small = type(step)(step.model, step.optimizer, step.loss, max_positives=5)
    _, cut = one_device(small)(state, split(batch, 1))
    assert metrics.dropped_positives == 0
    assert cut.positives == 5
    assert cut.dropped_positives == metrics.positives - 5
