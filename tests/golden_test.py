"""Our network and training step against what the PyTorch oracle said (tests/golden/*.npz).

Small copies of the released models with weights that NumPy draws; `make parity` compares the full
ones. tests/oracle/make_golden.py writes the arrays.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.model import AlignPS, build_model, weights_template
from alignps_jax.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.postprocess import detect
from alignps_jax.released_names import from_torch, released_name, to_torch
from alignps_jax.train import is_frozen
from alignps_jax.train_step import AXIS, TrainStep
from alignps_jax.types import Batch, OIMMemory, TrainState, Weights
from configs import cuhk, prw
from tests.oracle import golden
from tests.oracle.random_weights import random_state_dict
from tests.oracle.scenes import Scene


def released_config(name: str) -> ConfigDict:
    dataset, _, plus = name.partition("_")
    config = {"cuhk": cuhk, "prw": prw}[dataset].get_config(f"released{plus and '_plus'}")
    config.model.backbone_width = golden.WIDTHS["width"]
    config.model.channels = golden.WIDTHS["channels"]
    config.model.norm_groups = golden.WIDTHS["groups"]
    config.loss.lut_size = golden.MEMORY["lut_size"]
    config.loss.queue_size = golden.MEMORY["queue_size"]
    config.optimizer.weight_decay = golden.WEIGHT_DECAY
    config.optimizer.warmup = f"{golden.RULES['warmup']} steps"
    config.optimizer.drops = tuple(f"{step} steps" for step in golden.RULES["drops"])
    return config


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def random_weights(model: AlignPS, *, gentle: bool) -> tuple[Weights, OIMMemory]:
    """The oracle's weights and memory, drawn again."""
    size, slots, channels = *golden.MEMORY.values(), golden.WIDTHS["channels"]
    template = weights_template(model)
    memory = OIMMemory(
        lut=np.empty((size, channels), np.float32),
        queue=np.empty((slots, channels), np.float32),
        tail=np.int32(0),
    )
    leaves = by_path({"params": template.params, "frozen": template.frozen, "memory": memory})
    shapes = {
        released_name(path): to_torch(np.empty(leaf.shape, np.bool_)).shape
        for path, leaf in leaves.items()
    }
    state = random_state_dict(shapes, 1, gentle)
    arrays = {
        path: jnp.asarray(from_torch(state[released_name(path)]), leaf.dtype)
        for path, leaf in leaves.items()
    }
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    step = jnp.zeros((), jnp.int32)
    return Weights(step, tree["params"], tree["frozen"]), OIMMemory(**tree["memory"])


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("name", golden.INFERENCE)
def test_inference(name):
    config = released_config(name)
    model = build_model(config)
    weights, _ = random_weights(model, gentle=False)
    image = golden.image()
    scene = Scene(image[None], np.zeros((1, 1, 4)), np.zeros((1, 1)), np.zeros((1, 1), bool))
    rules = config.eval

    @jax.jit
    def run(weights: Weights, batch: Batch):
        outputs, state = model.apply(
            {"params": weights.params, "frozen": weights.frozen},
            batch.image,
            batch.size,
            capture_intermediates=lambda module, _: module.name in ("backbone", "lateral5"),
            mutable=["intermediates"],
        )
        detections = detect(
            outputs,
            batch.size,
            batch.scale,
            strides=(8,),
            pre_nms=rules.pre_nms,
            min_cls_score=rules.min_cls_score,
            nms_iou=rules.nms_iou,
            max_detections=rules.max_detections,
        )
        return outputs[0], state["intermediates"], detections

    output, captured, detections = run(weights, scene.batch())
    found = {
        "C5": captured["backbone"]["__call__"][0][-1],
        "lateral5": captured["neck"]["lateral5"]["__call__"][0],
        "P3": output.embeddings,
        "cls": output.cls_logits[..., None],
        "box": output.box_distances,
        "centerness": output.centerness_logits[..., None],
    }
    with np.load(golden.FOLDER / f"inference_{name}.npz") as expected:
        for key, value in found.items():
            assert relative_error(value, expected[key]) <= 1e-4, key
        valid = np.asarray(detections.valid[0])
        assert valid.sum() == len(expected["detected_scores"]) > 10
        scores, boxes = detections.scores[0][valid], detections.boxes[0][valid]
        np.testing.assert_allclose(scores, expected["detected_scores"], atol=1e-4)
        np.testing.assert_allclose(boxes, expected["detected_boxes"], atol=0.05)
        embeddings = detections.embeddings[0][valid] * expected["detected_embeddings"]
        assert embeddings.sum(1).min() >= 0.9999


def recorded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser; its state holds the last gradient beside its own."""

    def update(gradient, state, params):
        updates, inner = optimizer.update(gradient, state[1], params)
        return updates, (gradient, inner)

    return optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), optimizer.init(params)), update
    )


@pytest.mark.parametrize("name", golden.TRAINING)
def test_training(name):
    config = released_config(name)
    model = build_model(config)
    weights, memory = random_weights(model, gentle=True)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = recorded(make_optimizer(config.optimizer, schedule, partial(is_frozen, model)))
    step = jax.pmap(
        TrainStep(model, optimizer, config.loss, max_positives=100),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=jax.local_devices()[:1],
    )
    state = TrainState(
        step=weights.step,
        params=weights.params,
        frozen=weights.frozen,
        opt_state=optimizer.init(weights.params),
        memory=memory,
        rng=jax.random.key(0),
    )
    with np.load(golden.FOLDER / f"training_{name}.npz") as arrays:
        expected = dict(arrays)
    for turn, scene in enumerate(golden.scenes()):
        state, metrics = step(state, jax.tree.map(lambda x: x[None], scene.batch()))
        for key, value in metrics.terms.items():
            assert relative_error(value, expected.pop(f"loss/{turn}/{key}")) <= 1e-3, (turn, key)
        if turn == 0:
            for path, value in by_path({"params": state.opt_state[0]}).items():
                norm = expected.pop(f"gradient/{released_name(path)}", 0)  # 0: frozen
                found = np.linalg.norm(np.asarray(value, np.float64))
                assert found == pytest.approx(norm, rel=1e-3, abs=1e-7), path
    for path, value in by_path({"params": state.params, "memory": state.memory}).items():
        value = to_torch(np.asarray(value))
        if value.ndim == 4:
            value = np.array([np.linalg.norm(value), value.flat[0]])
        error = relative_error(value, expected.pop(f"after/{released_name(path)}"))
        assert error <= 1e-3, path
    assert not expected
