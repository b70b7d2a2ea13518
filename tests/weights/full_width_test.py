"""The four released models at their real width: converted, exported, fine-tuned and resumed."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from alignps_jax.checkpoint.store import Checkpoints
from alignps_jax.nn.model import build_model
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.pretrained import starting_arrays, starting_config
from alignps_jax.training.setup import check_changes, create_state
from alignps_jax.weights.convert import convert_released, export_released
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, to_torch
from alignps_jax.weights.tensor_files import read_tensors
from configs import cuhk, prw
from tests.oracle.random_weights import random_state_dict
from tests.weights.convert_test import assert_equal, model_shapes, saved, uncounted


@pytest.mark.parametrize("variant", ["released", "released_plus"])
@pytest.mark.parametrize("module", [cuhk, prw])
def test_a_released_model_serves_every_purpose(module, variant, tmp_path):
    config = module.get_config(variant)
    rows, slots = (5532, 5000) if module is cuhk else (483, 500)
    memory = {LOOKUP_TABLE: (rows, 256), QUEUE: (slots, 256), QUEUE.replace("queue", "tail"): ()}
    shapes = model_shapes(config) | memory
    counts = {
        name.replace("running_var", "num_batches_tracked"): ()
        for name in shapes
        if name.endswith("running_var")
    }
    tensors = random_state_dict(shapes | counts, seed=3)
    assert len(tensors) == (390 if variant == "released" else 416)
    workdir = tmp_path / "out"
    convert_released(config, saved(tmp_path, tensors), workdir)

    export_released(workdir, tmp_path / "back.safetensors")
    found = read_tensors(tmp_path / "back.safetensors")
    assert len(found) == len(tensors)
    assert_equal(uncounted(found), uncounted(tensors))

    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=100)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    check_changes(starting_config(config, workdir), workdir, accepted=False)
    with Checkpoints(workdir, keep=1, config=config) as checkpoints:
        template = jax.eval_shape(partial(create_state, config, model, optimizer, rows))
        state, position = checkpoints.restore(template)
    assert position is None  # no data seen
    np.testing.assert_array_equal(state.memory.lut, tensors[LOOKUP_TABLE])
    np.testing.assert_array_equal(state.memory.queue, tensors[QUEUE])
    assert state.memory.tail == tensors[QUEUE.replace("queue", "tail")]

    tuned = cuhk.get_config(variant)  # on other people
    tuned.model.pretrained = str(workdir)
    tuned = starting_config(tuned, tmp_path / "tuned")
    found = starting_arrays(tuned, build_model(tuned))["params/head/cls_predictor/kernel"]
    np.testing.assert_array_equal(to_torch(found), tensors["bbox_head.conv_cls.weight"])
