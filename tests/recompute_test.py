"""`model.remat`: same parameters, results and gradients, for less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignps_jax.model import build_model, init_variables
from alignps_jax.recompute import recomputed
from configs import tiny
from tests.fakes import random_batch, randomize


@pytest.mark.parametrize(("variant", "backbone"), [("released", "resnet_small"), ("", "resnet50")])
def test_remat_changes_memory_only(variant, backbone):
    batch = random_batch(np.random.default_rng(0))
    found = {}
    for remat in (False, True):
        config = tiny.get_config(variant)
        config.model.remat, config.model.backbone = remat, backbone
        config.model.frozen_stages = 1
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
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(np.abs(b).max(), 1e-3))
    assert less < (0.6 if backbone == "resnet50" else 0.8) * memory


def test_a_gradient_that_is_not_finite_stays_so():
    module = recomputed(nn.Dense)(3)
    x = jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    out, pull = jax.vjp(lambda v, x: module.apply(v, x), variables, x)
    np.testing.assert_allclose(out, nn.Dense(3).apply(variables, x), rtol=1e-6)
    for bad in (jnp.nan, jnp.inf):
        for cotangent in jax.tree.leaves(pull(jnp.full_like(out, bad))):
            assert not np.isfinite(cotangent).any()
