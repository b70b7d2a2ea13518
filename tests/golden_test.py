"""Our network and training step against what the PyTorch oracle said (tests/golden/*.npz).

Small copies of the released models with weights that NumPy draws; `make parity` compares the full
ones. tests/oracle/make_golden.py writes the arrays.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.step import TrainStep
from alignps_jax.types import OIMMemory, Weights
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, from_torch, released_name
from tests.oracle import golden
from tests.oracle.random_weights import random_state_dict
from tests.oracle.scenes import Scene
from tests.parity.ours import (
    by_released_name,
    first_state,
    one_device,
    recorded,
    relative_error,
    released_config,
    released_shapes,
    run_stages,
)

TAIL = QUEUE.replace("queue", "tail")


def make_config(name: str) -> ConfigDict:
    config = released_config(name, **golden.WIDTHS)
    config.loss.lut_size = golden.MEMORY["lut_size"]
    config.loss.queue_size = golden.MEMORY["queue_size"]
    config.optimizer.weight_decay = golden.RULES["weight_decay"]
    config.optimizer.clip_norm = golden.RULES["clip_norm"]
    config.optimizer.warmup = f"{golden.RULES['warmup']} steps"
    config.optimizer.drops = tuple(f"{step} steps" for step in golden.RULES["drops"])
    return config


def random_weights(model: AlignPS, *, gentle: bool) -> Weights:
    """The oracle's weights, drawn again."""
    template = weights_template(model)
    tree = {"params": template.params, "frozen": template.frozen}
    state = random_state_dict(released_shapes(tree), 1, gentle)
    arrays = {
        path: jnp.asarray(from_torch(state[released_name(path)])) for path in leaves_by_path(tree)
    }
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    return Weights(jnp.zeros((), jnp.int32), tree["params"], tree["frozen"])


@pytest.mark.parametrize("name", golden.INFERENCE)
def test_inference(name):
    config = make_config(name)
    model = build_model(config)
    image = golden.image()
    scene = Scene(image[None], np.zeros((1, 1, 4)), np.zeros((1, 1)), np.zeros((1, 1), bool))
    weights = random_weights(model, gentle=False)
    found, detections = run_stages(model, weights, config.eval, scene.batch())
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
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = recorded(make_optimizer(config.optimizer, schedule, partial(is_frozen, model)))
    step = one_device(TrainStep(model, optimizer, config.loss, max_positives=100))
    state = first_state(random_weights(model, gentle=True), memory, optimizer)
    batches = [jax.tree.map(lambda x: x[None], scene.batch()) for scene in golden.scenes()]
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
