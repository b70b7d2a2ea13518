"""Twenty released training steps, the oracle's beside ours; prints what they differ by as JSON.

python -m tests.parity.twenty_steps START MODEL          # everything in float32
python -m tests.parity.in_float64 tests.parity.twenty_steps START MODEL

START names an entry of `STARTS`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

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
from tests.parity.ours import by_released_name, first_state, one_device, relative_error

STEPS = 20
SIZE = (122, 154)  # fed as 128 x 160
WIDTHS = {"width": 8, "channels": 96, "groups": 8}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts, its schedule in steps, and the norm that gradients are clipped to.

    `trained`: from what a converted detector has, biases, offsets and a memory of its embeddings.
    Otherwise as the released training starts: the memory is empty, and all but the backbone's own
    weights are initial, offsets of zero and a head of N(0, 0.01) among them.
    """

    trained: bool
    warmup: int
    drops: tuple[int, ...]
    clip_norm: float


STARTS = {
    # Every rule within the twenty steps: both drops, and some gradients clipped, others not.
    "converted": Start(trained=True, warmup=8, drops=(12, 16), clip_norm=15.0),
    # The first twenty steps as released.
    "initial": Start(trained=False, warmup=500, drops=(), clip_norm=35.0),
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


def to_dtype(people: list, dtype: torch.dtype) -> list:
    return [(boxes.to(dtype), identity) for boxes, identity in people]


def clip_exactly(parameters: list[torch.nn.Parameter], limit: float) -> None:
    """Without the 1e-6 that PyTorch adds to the norm: rounding in float32, but not in float64."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= (limit / norm).clamp(max=1)


def run(name: str, start: Start, folder: Path) -> dict:
    batches = [make_batch(seed, SIZE, DTYPE) for seed in (3, 4)]
    pair = make_pair(
        name,
        folder,
        gentle=True,
        batches=[batch[1:] for batch in batches],
        dtype=getattr(torch, DTYPE),
        **WIDTHS,
    )
    if not start.trained:
        pair = with_initial_weights(pair)
    config = pair.config.optimizer
    config.warmup = f"{start.warmup} steps"
    config.drops = tuple(f"{step} steps" for step in start.drops)
    config.clip_norm = start.clip_norm
    schedule = learning_rate_schedule(config, steps_per_epoch=1)
    optimizer = make_optimizer(config, schedule, partial(is_frozen, pair.model))
    step = one_device(TrainStep(pair.model, optimizer, pair.config.loss, 100))
    state = first_state(pair.weights, pair.memory, optimizer)
    before = {key: value.clone() for key, value in pair.oracle.state_dict().items()}
    rules = {
        "weight_decay": config.weight_decay,
        "warmup": start.warmup,
        "drops": start.drops,
        "clip_norm": start.clip_norm,
    }
    single = copy.deepcopy(pair.oracle).float()
    exact = {"clip": clip_exactly} if DTYPE == "float64" else {}
    trainer, single_trainer = Trainer(pair.oracle, **rules, **exact), Trainer(single, **rules)
    losses, clipped = [], 0
    for turn in range(STEPS):
        batch, pixels, people = batches[turn % 2]
        terms = trainer.step(pixels, people)
        if DTYPE == "float64":
            single_trainer.step(pixels.float(), to_dtype(people, torch.float32))
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
        losses.append(max(relative_error(metrics.terms[key], terms[key]) for key in terms))
        clipped += bool(metrics.grad_norm > config.clip_norm)

    after = pair.oracle.state_dict()
    ours = by_released_name({"params": state.params})
    unchanged = [key for key in ours if torch.equal(before[key], after[key])]
    frozen = by_released_name({"frozen": state.frozen}) | {key: ours[key] for key in unchanged}
    for key, value in frozen.items():
        np.testing.assert_array_equal(value, before[key].numpy(), err_msg=key)
    changed = [key for key in ours if key not in unchanged]
    errors = {key: relative_error(ours[key], after[key].numpy()) for key in changed}
    result = {
        "losses": max(losses),
        "first_losses": losses[0],
        "parameters": max(errors.values()),
        "worst": max(errors, key=errors.get),
        "memory": max(memory_errors(pair.oracle, state.memory).values()),
        "changed": len(changed),
        "unchanged": unchanged,
        "clipped": clipped,
    }
    if DTYPE == "float64":
        rounded = single.state_dict()
        rounding = {key: relative_error(rounded[key], after[key].numpy()) for key in changed}
        memory = [key for key in after if "matching_layer" in key and "tail" not in key]
        result["oracle_rounding"] = {
            "parameters": max(rounding.values()),
            "worst": max(rounding, key=rounding.get),
            "memory": max(relative_error(rounded[key], after[key].numpy()) for key in memory),
        }
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(sys.argv[2], STARTS[sys.argv[1]], Path(folder))))
