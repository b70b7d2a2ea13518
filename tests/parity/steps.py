"""Released training steps, the oracle's beside ours; prints what they differ by as JSON.

python -m tests.parity.steps CASE MODEL          # everything in float32
python -m tests.parity.in_float64 tests.parity.steps CASE MODEL

trained: two steps at full width on one scene, with the smaller activations of a trained network;
  the weights stay as they are, only the memory changes.
rough: the same with weights drawn without regard to that. Some samples of the deformable
  convolutions then lie so close to a kink of the interpolation that float32 rounding decides on the
  side, and with it the gradient.
converted: twenty steps of a narrow copy, and every rule of the optimizer within them.
initial: the same, but apart from the backbone its weights are what the released training starts
  from, with empty memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import traverse_util

from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import init_variables
from tests.oracle import golden
from tests.oracle.scenes import make_scene
from tests.oracle.training_torch import Trainer
from tests.parity.common import DTYPE, Pair, make_pair, scene_for_oracle
from tests.parity.ours import apply_rules, by_released_name, relative_error, start_training


def with_initial_weights(pair: Pair) -> Pair:
    params, _ = init_variables(pair.model, jax.random.key(1))
    initial, ours = (traverse_util.flatten_dict(p) for p in (params, pair.weights.params))
    mixed = {
        path: value if path[0] == "backbone" and "offset" not in path else initial[path]
        for path, value in ours.items()
    }
    params = traverse_util.unflatten_dict(mixed)
    named = by_released_name({"params": params})
    state = {key: torch.from_numpy(np.array(value)) for key, value in named.items()}
    pair.oracle.load_state_dict(state, strict=False)
    for memory in pair.oracle.bbox_head.buffers():
        memory.zero_()
    return dataclasses.replace(
        pair,
        weights=pair.weights.replace(params=params),
        memory=init_memory(*pair.memory.lut.shape[:1], *pair.memory.queue.shape),
    )


def gradient_errors(oracle: dict[str, torch.Tensor], ours: dict[str, np.ndarray]) -> dict[str, Any]:
    """Largest relative errors of a gradient's norm and of the whole gradient, over parameters."""
    norms, errors = [], []
    for key, found in ours.items():
        if key in oracle and oracle[key].any():
            expected = oracle[key].numpy()
            norms.append(relative_error(np.linalg.norm(found), np.linalg.norm(expected)))
            errors.append(relative_error(found, expected))
        else:  # frozen, or of a level without positives
            np.testing.assert_array_equal(found, 0)
    return {"gradients": len(norms), "norm": max(norms), "tensor": max(errors)}


def run(case: str, name: str, folder: Path) -> dict[str, Any]:
    narrow = case in ("converted", "initial")
    scenes = [make_scene(seed, 40, golden.SIZE if narrow else (250, 310)) for seed in (3, 4)]
    scenes = [scene.replace(boxes=scene.boxes.astype(DTYPE)) for scene in scenes]
    batches = [scene_for_oracle(scene, DTYPE) for scene in scenes]
    pair = make_pair(
        name,
        folder,
        gentle=case != "rough",
        batches=batches if narrow else (),
        dtype=getattr(torch, DTYPE),
        **(golden.WIDTHS if narrow else {}),
    )
    pair = with_initial_weights(pair) if case == "initial" else pair
    config = pair.config.optimizer
    rules = {"warmup": 500, "drops": (), "clip_norm": 35.0, "weight_decay": config.weight_decay}
    rules = golden.RULES if case == "converted" else rules
    config.learning_rate *= narrow
    apply_rules(config, rules)
    step, state = start_training(pair.config, pair.model, pair.weights, pair.memory)
    trainer = Trainer(pair.oracle, rate=config.learning_rate, **rules)
    before = {key: value.clone() for key, value in pair.oracle.state_dict().items()}
    losses, gradients, clipped = [], [], 0
    for turn in range(20 if narrow else 2):
        scene = turn % 2 if narrow else 0
        terms = trainer.step(*batches[scene])
        state, metrics = step(state, jax.tree.map(lambda x: x[None], scenes[scene]))
        assert set(metrics.terms) == set(terms)
        losses.append(max(relative_error(metrics.terms[key], terms[key]) for key in terms))
        clipped += bool(metrics.grad_norm > config.clip_norm)
        if turn == 0 or not narrow:  # later ones differ by the rounding of their weights
            ours = by_released_name({"params": state.opt_state[0]})
            gradients.append(gradient_errors(trainer.gradients, ours))

    after = pair.oracle.state_dict()
    parts = {part: getattr(state, part) for part in ("params", "frozen", "memory")}
    params, frozen, memory = (by_released_name({part: x}) for part, x in parts.items())
    unchanged = [key for key in params if torch.equal(before[key], after[key])]
    for key, value in (frozen | {key: params.pop(key) for key in unchanged}).items():
        np.testing.assert_array_equal(value, before[key].numpy(), err_msg=key)
    errors = {
        part: max((relative_error(x, after[key].numpy()) for key, x in ours.items()), default=0.0)
        for part, ours in {"parameters": params, "memory": memory}.items()
    }
    return {
        **{key: max(found[key] for found in gradients) for key in gradients[0]},
        **{"losses": max(losses), **errors, "changed": len(params), "unchanged": unchanged},
        "clipped": clipped,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(*sys.argv[1:], Path(folder))))
