"""Our network and training step against what the PyTorch oracle said (tests/golden/*.npz).

Small copies of the released models with weights that NumPy draws; `make parity` compares the full
ones. tests/oracle/make_golden.py writes the arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.types import OIMMemory, Weights
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, from_torch, released_name
from tests.oracle import golden
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import (
    apply_rules,
    by_released_name,
    relative_error,
    released_config,
    released_shapes,
    run_stages,
    start_training,
)

TAIL = QUEUE.replace("queue", "tail")


def make_config(name: str) -> ConfigDict:
    config = released_config(name, **golden.WIDTHS)
    config.loss.update(golden.MEMORY)
    apply_rules(config.optimizer, golden.RULES)
    return config


def random_weights(model: AlignPS, *, gentle: bool) -> Weights:
    """The oracle's weights, drawn again."""
    template = weights_template(model)
    tree = {"params": template.params, "frozen": template.frozen}
    state = random_state_dict(released_shapes(tree), 1, gentle)
    names = {path: released_name(path) for path in leaves_by_path(tree)}
    arrays = {path: jnp.asarray(from_torch(state[name], name)) for path, name in names.items()}
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    return Weights(jnp.zeros((), jnp.int32), tree["params"], tree["frozen"])


@pytest.mark.parametrize("name", golden.INFERENCE)
def test_inference(name):
    config = make_config(name)
    model = build_model(config)
    weights = random_weights(model, gentle=False)
    batch = jax.tree.map(lambda x: x[:1], golden.scenes()[0])
    found, detections = run_stages(model, weights, config.eval, batch)
    with np.load(golden.FOLDER / f"inference_{name}.npz") as file:
        expected = dict(file)
    wanted = {key: expected.pop(f"detected_{key}") for key in ("scores", "boxes", "embeddings")}
    for key, value in expected.items():
        assert relative_error(found[key], value) <= 1e-4, key
    valid = detections.valid[0]
    assert valid.sum() == len(wanted["scores"]) > 10
    np.testing.assert_allclose(detections.scores[0][valid], wanted["scores"], atol=1e-4)
    np.testing.assert_allclose(detections.boxes[0][valid], wanted["boxes"], atol=0.05)
    cosine = (detections.embeddings[0][valid] * wanted["embeddings"]).sum(1)
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("name", golden.TRAINING)
def test_training(name):
    config = make_config(name)
    model = build_model(config)
    with np.load(golden.FOLDER / f"training_{name}.npz") as file:
        expected = dict(file)
    memory = OIMMemory(
        lut=jnp.asarray(expected.pop(f"before/{LOOKUP_TABLE}")),
        queue=jnp.asarray(expected.pop(f"before/{QUEUE}")),
        tail=jnp.asarray(expected.pop(f"before/{TAIL}"), jnp.int32),
    )
    weights = random_weights(model, gentle=True)
    step, state = start_training(config, model, weights, memory)
    batches = [jax.tree.map(lambda x: x[None], scene) for scene in golden.scenes()]
    clipped = []
    for turn in range(golden.STEPS):
        state, metrics = step(state, batches[turn % len(batches)])
        clipped.append(bool(metrics.grad_norm > config.optimizer.clip_norm))
        for key, value in metrics.terms.items():
            assert relative_error(value, expected.pop(f"loss/{turn}/{key}")) <= 1e-3, (turn, key)
        if turn == 0:
            for path, value in leaves_by_path({"params": state.opt_state[0]}).items():
                norm = expected.pop(f"gradient/{released_name(path)}", 0)  # 0: frozen
                found = np.linalg.norm(np.asarray(value, np.float64))
                assert found == pytest.approx(norm, rel=1e-3, abs=1e-7), path
    assert any(clipped)
    assert not all(clipped)
    after = by_released_name({"params": state.params, "memory": state.memory})
    for key, value in after.items():
        if value.ndim == 4:
            value = np.array([np.linalg.norm(value), value.flat[0]])
        assert relative_error(value, expected.pop(f"after/{key}")) <= 1e-3, key
    assert not expected
