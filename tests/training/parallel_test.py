"""The ways in which a step comes to run on all devices: the same result to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.devices import PARALLEL, parallel_train_step, replicate, split_over_devices
from alignps_jax.types import UserError
from configs import tiny
from tests.fakes import random_batch, train_setup


def test_all_ways_are_equal_to_the_last_bit_and_each_continues_the_other():
    count = 2
    devices = jax.devices()[:count]
    _, step, start = train_setup(tiny.get_config(), devices=count)
    ways = {name: parallel_train_step(step, name, devices) for name in PARALLEL}

    def after(*names):
        # Copied, because the buffers of the state that goes in are reused.
        state, metrics = replicate(jax.tree.map(jnp.copy, start), devices), []
        for number, name in enumerate(names):
            batch = split_over_devices(random_batch(np.random.default_rng(number)), count)
            state, found = ways[name](state, batch)
            metrics.append(jax.device_get(found))
        return jax.device_get((state, metrics))

    expected = after("pmap", "pmap")
    moved = [
        not np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(start), jax.tree.leaves(expected[0]), strict=True)
    ]
    assert sum(moved) > 0.5 * len(moved)
    for names in (("shard_map", "shard_map"), ("pmap", "shard_map"), ("shard_map", "pmap")):
        jax.tree.map(np.testing.assert_array_equal, after(*names), expected)


def test_an_unknown_way_names_the_known_ones():
    with pytest.raises(UserError, match=r"config\.train\.parallel: found 'jit', expected one of p"):
        parallel_train_step(lambda state, batch: (state, None), "jit")
