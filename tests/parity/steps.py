"""Released training steps, the oracle's beside ours; prints what they differ by as JSON.

python -m tests.parity.steps CASE MODEL          # everything in float32
python -m tests.parity.in_float64 tests.parity.steps CASE MODEL
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import traverse_util

from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import init_variables
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.step import TrainStep
from tests.oracle.training_torch import Trainer
from tests.parity.common import DTYPE, Pair, make_batch, make_pair, memory_errors
from tests.parity.ours import (
    by_released_name,
    first_state,
    one_device,
    recorded,
    relative_error,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Steps on images of a size, and the rules in steps; without `widths` at full width.

    `gentle` weights have the smaller activations of a trained network. Others are drawn without
    regard to that: some samples of the deformable convolutions then lie so close to a kink of the
    interpolation that float32 rounding decides on the side, and with it the gradient. `initial`
    weights, but for the backbone, are what the released training starts from, with empty memory.
    `fixed` weights see one scene in all steps: only the memory changes.
    """

    steps: int
    size: tuple[int, int]
    gentle: bool = True
    initial: bool = False
    fixed: bool = False
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    warmup: int = 500
    drops: tuple[int, ...] = ()
    clip_norm: float = 35.0


# Fed as 256 x 320, and small ones as 128 x 160.
FULL = partial(Case, 2, (250, 310), fixed=True)
NARROW = partial(Case, 20, (122, 154), widths={"width": 8, "channels": 96, "groups": 8})
CASES = {
    "trained": FULL(),
    "rough": FULL(gentle=False),
    # Every rule within the twenty steps: both drops, and some gradients clipped, others not.
    "converted": NARROW(warmup=8, drops=(12, 16), clip_norm=15.0),
    "initial": NARROW(initial=True),
}


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


def clip_exactly(parameters: list[torch.nn.Parameter], limit: float) -> None:
    """Without the 1e-6 that PyTorch adds to the norm: rounding in float32, but not in float64."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= (limit / norm).clamp(max=1)


def gradient_errors(oracle: dict[str, torch.Tensor], ours: dict[str, np.ndarray]) -> dict[str, Any]:
    """Largest relative errors of a gradient's norm and of the whole gradient, over parameters."""
    norms, errors = {}, {}
    for key, found in ours.items():
        if key in oracle and oracle[key].any():
            expected = oracle[key].numpy()
            norms[key] = relative_error(np.linalg.norm(found), np.linalg.norm(expected))
            errors[key] = relative_error(found, expected)
        else:  # frozen, or of a level without positives
            np.testing.assert_array_equal(found, 0)
    worst = max(norms, key=norms.get)
    return {"gradients": len(norms), "norm": norms[worst], "tensor": max(errors.values())}


def run(name: str, case: Case, folder: Path) -> dict[str, Any]:
    batches = [make_batch(seed, case.size, DTYPE) for seed in (3, 4)]
    remembered = [] if case.fixed else [batch[1:] for batch in batches]
    dtype = getattr(torch, DTYPE)
    pair = make_pair(
        name, folder, gentle=case.gentle, batches=remembered, dtype=dtype, **case.widths
    )
    if case.initial:
        pair = with_initial_weights(pair)
    config = pair.config.optimizer
    config.learning_rate *= not case.fixed
    config.warmup, config.clip_norm = f"{case.warmup} steps", case.clip_norm
    config.drops = tuple(f"{step} steps" for step in case.drops)
    schedule = learning_rate_schedule(config, steps_per_epoch=1)
    optimizer = recorded(make_optimizer(config, schedule, partial(is_frozen, pair.model)))
    step = one_device(TrainStep(pair.model, optimizer, pair.config.loss, 100))
    state = first_state(pair.weights, pair.memory, optimizer)
    before = {key: value.clone() for key, value in pair.oracle.state_dict().items()}
    trainer = Trainer(
        pair.oracle,
        weight_decay=config.weight_decay,
        warmup=case.warmup,
        drops=case.drops,
        clip_norm=case.clip_norm,
        rate=config.learning_rate,
        **({"clip": clip_exactly} if DTYPE == "float64" else {}),
    )
    losses, gradients, clipped = [], [], 0
    for turn in range(case.steps):
        batch, pixels, people = batches[0 if case.fixed else turn % 2]
        terms = trainer.step(pixels, people)
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
        assert set(metrics.terms) == set(terms)
        losses.append(max(relative_error(metrics.terms[key], terms[key]) for key in terms))
        clipped += bool(metrics.grad_norm > config.clip_norm)
        if turn == 0 or case.fixed:  # of other weights, which differ by their rounding, they differ
            ours = by_released_name({"params": state.opt_state[0]})
            gradients.append(gradient_errors(trainer.gradients, ours))

    after = pair.oracle.state_dict()
    ours = by_released_name({"params": state.params})
    unchanged = [key for key in ours if torch.equal(before[key], after[key])]
    frozen = by_released_name({"frozen": state.frozen}) | {key: ours[key] for key in unchanged}
    for key, value in frozen.items():
        np.testing.assert_array_equal(value, before[key].numpy(), err_msg=key)
    changed = [key for key in ours if key not in unchanged]
    return {
        **{key: max(found[key] for found in gradients) for key in gradients[0]},
        "losses": max(losses),
        "parameters": max(
            (relative_error(ours[key], after[key].numpy()) for key in changed), default=0.0
        ),
        "memory": max(memory_errors(pair.oracle, state.memory).values()),
        "changed": len(changed),
        "unchanged": unchanged,
        "clipped": clipped,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(sys.argv[2], CASES[sys.argv[1]], Path(folder))))
