"""Released training steps, the oracle's beside ours; prints what they differ by as JSON.

python -m tests.parity.steps CASE MODEL          # everything in float32
python -m tests.parity.in_float64 tests.parity.steps CASE MODEL

trained: two steps at full width on one scene, with the smaller activations of a trained network;
  the weights stay as they are, only the memory changes.
rough: the same with weights drawn without regard to that. Some samples of the deformable
  convolutions then lie so close to a kink of the interpolation that float32 rounding decides on the
  side, and with it the gradient.
converted: twenty steps of a narrow copy, and every rule of the optimizer within them.
initial: the same of AlignPS, but apart from the backbone its weights are what the released training
  starts from, with empty memory.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import traverse_util

from alignps_jax.losses.oim import init_memory
from alignps_jax.losses.rpn import ANCHORS, PROPOSALS
from alignps_jax.nn.model import init_variables
from alignps_jax.types import Batch, RoiDraws
from tests.oracle import golden, roi_torch
from tests.oracle.scenes import make_scene
from tests.oracle.training_torch import Trainer
from tests.parity.common import DTYPE, ROI_MODELS, Pair, make_pair, scene_for_oracle
from tests.parity.ours import apply_rules, by_released_name, relative_error, start_training

REGIONS = 32  # of an image, for time's sake
# Gradients that sum up to zero: of what a normalization, or a difference, takes away again.
CANCELED = ("projectors.0.0.bias", "projectors.1.0.bias", "fc_reg.0.bias", "T_func.2.bias")


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


def make_draws(turn: int, batch: Batch) -> RoiDraws:
    """Random choices; both branches learn from mutual information in step 0, but not in step 1.

    In float32 the best proposals are taken: rounding may exchange neighbors among them.
    """
    rng = np.random.default_rng(turn)
    (images, people), (height, width) = batch.valid.shape, batch.image.shape[1:3]
    roi = rng.random((images, people + PROPOSALS))
    if DTYPE == "float32":
        roi[:, people:].sort(axis=1)
    rpn = rng.random((images, height // 16 * (width // 16) * ANCHORS))
    gate = rng.integers(0, 99) if turn > 1 else 2 - turn
    shuffle = rng.random(images * REGIONS)
    return jax.tree.map(np.float32, RoiDraws(rpn, roi, (gate + 0.5) / 99, shuffle))


def oracle_steps(
    pair: Pair, batches: list[Batch], draws: list[RoiDraws | None], **rules: Any
) -> Iterator[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """Losses and gradients of one training step after another."""
    scenes = [scene_for_oracle(batch, DTYPE) for batch in batches]
    if pair.roi_memory is None:
        trainer = Trainer(pair.oracle, **rules)
        for scene in scenes:
            yield trainer.step(*scene), trainer.gradients
    else:
        parts = zip(scenes, batches, draws, strict=True)
        turns = [roi_torch.TrainingBatch(*x, batch.size.tolist(), own) for x, batch, own in parts]
        yield from roi_torch.train(pair.oracle, turns, **rules)


def gradient_errors(oracle: dict[str, torch.Tensor], ours: dict[str, np.ndarray]) -> dict[str, Any]:
    """Largest relative errors of a gradient's norm and of the whole gradient, over parameters."""
    norms, errors = [], []
    for key, found in ours.items():
        if key.endswith(CANCELED):
            assert abs(found).max() < 1e-5
        elif key in oracle and oracle[key].any():
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
    pair = make_pair(
        name,
        folder,
        gentle=case != "rough",
        batches=[scene_for_oracle(scene, DTYPE) for scene in scenes] if narrow else (),
        dtype=getattr(torch, DTYPE),
        **(golden.WIDTHS if narrow else {}),
        **({"rois": REGIONS} if name in ROI_MODELS else {}),
    )
    pair = with_initial_weights(pair) if case == "initial" else pair
    config = pair.config.optimizer
    rules = {"warmup": 500, "drops": ()}
    rules |= {key: config[key] for key in ("clip_norm", "weight_decay")}
    rules = golden.RULES if case == "converted" else rules
    if case == "converted" and pair.roi_memory is not None:  # its gradients are longer
        rules, config.learning_rate = rules | {"clip_norm": 79.0}, config.learning_rate / 5
    config.learning_rate *= narrow
    apply_rules(config, rules)
    parts = pair.model, pair.weights, pair.memory, pair.roi_memory
    step, state = start_training(pair.config, *parts)
    batches = [scenes[turn % 2] for turn in range(20)] if narrow else [scenes[0]] * 2
    draws: list[RoiDraws | None] = [None] * len(batches)
    if pair.roi_memory is not None:
        pair.config.loss.rois_per_image = REGIONS
        draws = [make_draws(turn, batch) for turn, batch in enumerate(batches)]
    oracle = oracle_steps(pair, batches, draws, rate=config.learning_rate, **rules)
    before = {key: value.clone() for key, value in pair.oracle.state_dict().items()}
    losses, gradients, clipped = [], [], 0
    turns = zip(batches, draws, strict=True)
    for turn, (own, (terms, expected)) in enumerate(zip(turns, oracle, strict=True)):
        state, metrics = step(state, *jax.tree.map(lambda x: x[None], own))
        assert set(metrics.terms) == set(terms)
        # Mutual information is a difference, which may be next to nothing.
        errors = {k: abs(metrics.terms[k] - x) / max(abs(x), 0.1) for k, x in terms.items()}
        losses.append({key: float(error) for key, error in errors.items()})
        clipped += bool(metrics.grad_norm > config.clip_norm)
        if turn == 0 or not narrow:  # later ones differ by the rounding of their weights
            ours = by_released_name({"params": state.opt_state[0]})
            gradients.append(gradient_errors(expected, ours))

    after = pair.oracle.state_dict()
    if pair.roi_memory is not None:
        after["roi_memory.tail"] = torch.tensor(pair.oracle.header)
    errors, changed, unchanged = {}, {}, []
    for part in ("params", "frozen", "memory", "roi_memory"):
        found = by_released_name({part: x} if (x := getattr(state, part)) is not None else {})
        same = [key for key in found if key in before and torch.equal(before[key], after[key])]
        for key in same:
            np.testing.assert_array_equal(found.pop(key), before[key].numpy(), err_msg=key)
        errors[part] = max(
            (relative_error(x, after[k].numpy()) for k, x in found.items()), default=0.0
        )
        changed[part] = len(found)
        unchanged += same * (part == "params")
    return {
        **{key: max(found[key] for found in gradients) for key in gradients[0]},
        "terms": (terms := {key: max(found[key] for found in losses) for key in losses[0]}),
        "losses": max(terms.values()),
        **{**errors, "changed": changed, "unchanged": unchanged, "clipped": clipped},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(*sys.argv[1:], Path(folder))))
