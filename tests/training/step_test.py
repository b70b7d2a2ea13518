"""One training step: exact data parallelism, frozen parameters, nobody in the images."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.devices import parallel_train_step, replicate
from alignps_jax.devices import split_over_devices as split
from alignps_jax.losses.oim import init_memory
from alignps_jax.losses.total import select_positives
from alignps_jax.nn.model import AlignPS
from alignps_jax.training.optimizer import is_frozen
from alignps_jax.types import Outputs, Targets, TrainState
from configs import tiny
from tests.fakes import random_batch, train_setup
from tests.parity.ours import one_device, relative_error


def pairs(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A state in the middle of training, and one step of it on one device."""

    config: ConfigDict
    model: AlignPS
    state: TrainState
    step: Callable


@pytest.fixture(scope="module", params=["released", "roi"])
def case(request) -> Case:
    config = tiny.get_config(request.param)
    config.model.frozen_stages = 1
    # Its trace holds the gradients; AdamW's first step would turn rounding into whole steps.
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.01
    model, step, state = train_setup(config, devices=1)
    return Case(config, model, state, one_device(step))


def test_four_devices_with_one_image_equal_one_device_with_four(case):
    batch = random_batch(np.random.default_rng(1))
    _, step_four, _ = train_setup(case.config, devices=4)
    state = case.state
    expected, expected_metrics = jax.device_get(case.step(state, split(batch, 1)))
    # Copied, because the buffers of the state that goes in are reused.
    copy = jax.tree.map(jnp.copy, state)
    four = parallel_train_step(step_four)
    found, found_metrics = jax.device_get(four(replicate(copy), split(batch, 4)))

    assert expected_metrics.positives > 10
    for name, value in expected_metrics.terms.items():
        assert value != 0, name
        # Mutual information is next to nothing at first, the difference of two large numbers.
        atol = 1e-7 if name == "mutual_information" else 0.0
        np.testing.assert_allclose(found_metrics.terms[name], value, rtol=1e-5, atol=atol)
    # Without momentum yet, the trace of the optimizer holds the clipped, decayed gradients.
    for leaf, wanted in pairs(found, expected):
        # Where a scalar's gradient is a sum that cancels, rounding of its terms is all there is.
        rounding = float(np.finfo(np.float32).eps) / max(float(np.linalg.norm(wanted)), 1e-12)
        assert relative_error(leaf, wanted) <= 1e-5 + rounding
    assert found.memory.tail == expected.memory.tail
    assert found.memory.tail != state.memory.tail
    assert found.step == expected.step == 1


def test_images_without_people_give_only_a_classification_loss_and_finite_updates(case):
    batch = random_batch(np.random.default_rng(2))
    batch = batch.replace(valid=np.zeros_like(batch.valid))
    after, metrics = case.step(case.state, split(batch, 1))
    assert metrics.terms["cls"] > 0
    assert metrics.positives == 0
    for name in ("box", "centerness", "oim", "triplet"):
        assert metrics.terms[name] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    np.testing.assert_array_equal(after.memory.lut, case.state.memory.lut)
    np.testing.assert_array_equal(after.memory.queue, case.state.memory.queue)


@pytest.mark.parametrize("case", [""], indirect=True)
@pytest.mark.parametrize("queue_size", [0, 5])
def test_a_training_set_without_labeled_people_is_learned(case, queue_size):
    """Its lookup table has no rows."""
    batch = random_batch(np.random.default_rng(6))
    batch = batch.replace(labeled=np.zeros_like(batch.labeled))
    memory = init_memory(0, queue_size, case.config.model.channels)
    after, metrics = case.step(case.state.replace(memory=memory), split(batch, 1))
    assert metrics.positives > 10
    assert metrics.terms["box"] > 0
    assert metrics.terms["oim"] == metrics.terms["triplet"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    assert after.memory.lut.shape[0] == 0
    assert np.count_nonzero(np.any(after.memory.queue, axis=1)) == queue_size


def test_frozen_parameters_stay_and_all_others_move(case):
    batch = random_batch(np.random.default_rng(3))
    after, _ = case.step(case.state, split(batch, 1))
    before = traverse_util.flatten_dict(case.state.params)
    still = {
        path
        for path, leaf in traverse_util.flatten_dict(after.params).items()
        if np.array_equal(leaf, before[path])
    }
    assert still >= {path for path in before if is_frozen(case.model, path)}
    # On images this small P6 and P7 are pure background of a few locations: next to no gradient.
    trained = {path for path in still if not is_frozen(case.model, path)}
    assert {path[1] for path in trained} <= {"output6", "output7"}
    frozen = {path[1] for path in before if is_frozen(case.model, path)}
    assert frozen == {"conv1", "bn1", "layer1_0"}


def test_positives_beyond_the_limit_are_counted():
    rng = np.random.default_rng(5)
    features = [rng.normal(size=(2, 6, *channels)) for channels in ((), (4,), (), (3,))]
    flat = Outputs(*features, valid=np.ones((2, 6), bool))
    positive = np.array([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]], bool)
    identity = np.arange(12).reshape(2, 6)
    targets = Targets(positive, features[1], features[2], identity, labeled=positive)
    positives, dropped = select_positives(flat, targets, limit=4)
    assert dropped == 1
    assert positives.valid.all()
    np.testing.assert_array_equal(positives.identity, [1, 2, 5, 6])
    np.testing.assert_allclose(positives.embeddings[3], flat.embeddings[1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "parts", "rtol"),
    [("released", 4, 1e-5), ("roi", 2, 5e-5)],
    indirect=["case"],
)
def test_parts_of_a_batch_one_after_another_equal_all_at_once(case, parts, rtol):
    batch = split(random_batch(np.random.default_rng(7)), 1)
    expected, expected_metrics = jax.device_get(case.step(case.state, batch))
    _, step, _ = train_setup(case.config, devices=1)
    in_parts = one_device(dataclasses.replace(step, accumulate=parts))
    found, found_metrics = jax.device_get(in_parts(case.state, batch))
    assert expected_metrics.positives > 10
    for one, other in pairs((found, found_metrics), (expected, expected_metrics)):
        # The gradient of such a bias is a sum over all locations whose terms nearly cancel.
        cancels = np.size(one) <= 4 and abs(one - other).max() < 1e-7
        assert cancels or relative_error(one, other) <= rtol


@pytest.mark.parametrize("case", [""], indirect=True)
def test_the_average_follows_the_parameters_that_are_trained(case):
    batch = split(random_batch(np.random.default_rng(8)), 1)
    _, step, _ = train_setup(case.config, devices=1)
    averaging = one_device(dataclasses.replace(step, ema_decay=0.15))
    before = case.state.params
    state = case.state.replace(step=jnp.int32(0), raw=before)
    expected, found, average = case.state, state, before
    for share in (0.9, 0.85):  # 1 - 1 / 10, then 1 - min(0.15, 2 / 11)
        expected, _ = case.step(expected, batch)
        found, _ = averaging(found, batch)
        average = jax.tree.map(
            lambda old, new, s=share: (1 - s) * old + s * new, average, expected.params
        )
    wanted = expected.params, average, expected.memory
    for one, other in pairs((found.raw, found.params, found.memory), wanted):
        assert relative_error(one, other) <= 1e-5
    still = {path for path in traverse_util.flatten_dict(before) if is_frozen(case.model, path)}
    after = traverse_util.flatten_dict(found.params)
    for path in still:
        np.testing.assert_array_equal(after[path], traverse_util.flatten_dict(before)[path])
