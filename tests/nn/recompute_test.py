"""`model.remat`: same parameters, results and gradients, for less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignps_jax.nn.backbone import BottleneckBlock
from alignps_jax.nn.layers import FrozenBatchNorm
from alignps_jax.nn.model import build_model, init_variables
from alignps_jax.nn.recompute import recomputed
from configs import tiny
from tests.fakes import random_batch, randomize


def test_remat_changes_memory_only():
    batch = random_batch(np.random.default_rng(0))
    found = {}
    for remat in (False, True):
        config = tiny.get_config()
        config.model.remat = remat
        model = build_model(config)
        params, frozen = init_variables(model, jax.random.key(0))

        def loss(params, model=model, frozen=frozen):
            variables = {"params": params, "frozen": frozen}
            outputs = model.apply(variables, batch.image, batch.size, train=True)
            maps = [x for x in jax.tree.leaves(outputs) if x.dtype == jnp.float32]
            return sum(jnp.sin(x / 3).sum() for x in maps)

        step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        found[remat] = step(randomize(params)), step.memory_analysis().temp_size_in_bytes
    (plain, memory), (again, less) = found[False], found[True]
    assert_same_tree(again, plain)
    assert less < 0.8 * memory


@pytest.mark.parametrize("deformable", [False, True])
def test_a_bottleneck_block_has_the_same_gradients(deformable):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 6, 8, 12)), jnp.float32)
    valid_size = np.array([[6, 8], [4, 6]], np.int32)
    found = []
    for block in (BottleneckBlock, recomputed(BottleneckBlock)):
        module = block(4, 2, True, FrozenBatchNorm, deformable)
        variables = module.init(jax.random.key(0), x, valid_size)
        params = randomize(variables["params"])

        def loss(params, x, module=module, frozen=variables["frozen"]):
            return jnp.sin(module.apply({"params": params, "frozen": frozen}, x, valid_size)).sum()

        found.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x))
    assert_same_tree(*found)


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(np.abs(b).max(), 1e-3))


def test_a_gradient_that_is_not_finite_stays_so():
    module = recomputed(nn.Dense)(3)
    x = jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    out, pull = jax.vjp(lambda v, x: module.apply(v, x), variables, x)
    np.testing.assert_allclose(out, nn.Dense(3).apply(variables, x), rtol=1e-6)
    for bad in (jnp.nan, jnp.inf):
        for cotangent in jax.tree.leaves(pull(jnp.full_like(out, bad))):
            assert not np.isfinite(cotangent).any()
