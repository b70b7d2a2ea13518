"""The training step: forward, backward, update of parameters and memory."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.devices import parallel_train_step, replicate, split_over_devices
from alignps_jax.experiments.benchmark.measure import Timing, peak_memory, time_in_turns
from alignps_jax.experiments.benchmark.simulate import plausible_weights
from alignps_jax.nn.model import build_model
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.state import create_state, is_frozen
from alignps_jax.training.step import TrainStep
from alignps_jax.types import Batch, TrainState
from data_pipeline.transforms import Scale, Size, buckets
from tests.benchmark.growth_cases import made_up_batch
from tests.benchmark.measure import Context, Cost, Row, program_cost
from tests.benchmark.network import (
    compiled,
    configured,
    forward,
    on_device,
    plain_arithmetic,
    torch_network,
    torch_pixels,
)

POSITIVES_PER_LEVEL = 9  # with the radius of the paper
IDENTITIES = 5532
PEOPLE = 6  # per image
GOAL = "≤ 1.8× floor, backward ≤ 2.5× forward"


@dataclasses.dataclass(frozen=True)
class Case:
    """Images per step and device, and the scale whose bucket they fill."""

    images: int
    scale: Scale

    @property
    def title(self) -> str:
        return f"batch {self.images}, {self.scale[0]}×{self.scale[1]}"


# The first one is also measured in PyTorch, with `remat` and in bfloat16.
CASES = (Case(2, (1000, 600)), Case(4, (1000, 600)), Case(2, (1500, 900)))
QUICK_CASES = (Case(1, (64, 64)),)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step that resumes from its own state, and the forward pass alone."""

    run: Callable[[], Any]
    forward: Callable[[], Any]
    memory: float
    cost: Cost


def rows(context: Context) -> Iterator[Row]:
    """The paper's step per case; for the first one also its choices, beside PyTorch.

    The floor is the arithmetic of the step with plain convolutions and without recomputation.
    """
    first, *others = QUICK_CASES if context.quick else CASES
    config = configured(context)
    step = make_step(config, first)
    functions = {"step": step.run, "forward": step.forward}
    if context.torch is not None:
        functions["torch"] = _torch_step(context, config, first)
    times = time_in_turns(functions, runs=context.runs)
    context.step_seconds[first.title] = times["step"].median
    yield _row(context, config, first.title, step, times, GOAL + ", ≥ 4× PyTorch")
    yield from _choices(context, first, step)
    del step, functions
    for case in others:
        step = make_step(config, case)
        times = time_in_turns({"step": step.run, "forward": step.forward}, runs=context.runs)
        yield _row(context, config, case.title, step, times, GOAL)


def _choices(context: Context, case: Case, plain: Step) -> Iterator[Row]:
    """Recomputed activations and bfloat16, each in turns with the plain step."""
    choices = {
        "remat": ({"remat": True}, "≤ 0.6× memory for ≤ 1.35× time"),
        "bfloat16": ({"dtype": "bfloat16"}, ""),
    }
    for name, (changes, goal) in choices.items():
        config = configured(context, **changes)
        step = make_step(config, case)
        times = time_in_turns({"plain": plain.run, "step": step.run}, runs=context.runs)
        note = (
            f"{step.memory / plain.memory:.2f}× memory, "
            f"{times['step'].median / times['plain'].median:.2f}× time of the plain step"
        )
        yield Row(
            part="train",
            name=f"{case.title}, {name}",
            time=times["step"],
            floor=context.rate.floor(step.cost.flops, config.model.dtype),
            flops=step.cost.flops,
            bytes=step.cost.bytes,
            goal=goal,
            note=note,
            memory=step.memory,
        )


def _row(
    context: Context,
    config: ConfigDict,
    title: str,
    step: Step,
    times: dict[str, Timing],
    goal: str,
) -> Row:
    forward_time = times["forward"].median
    backward = (times["step"].median - forward_time) / forward_time
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes = [
        f"the rest is {backward:.2f}× the forward pass",
        f"this process so far at most {resident / 1e9:.1f} GB",
        context.torch_note,
    ]
    return Row(
        part="train",
        name=title,
        time=times["step"],
        floor=context.rate.floor(step.cost.flops, config.model.dtype),
        torch=times.get("torch"),
        flops=step.cost.flops,
        bytes=step.cost.bytes,
        goal=goal,
        note="; ".join(note for note in notes if note),
        memory=step.memory,
    )


def make_step(config: ConfigDict, case: Case) -> Step:
    """The step of a configuration, as training runs it, from a state before the first step."""
    step, state = _step_and_state(config, case)
    batch = made_up_batch(bucket(case), people=PEOPLE, images=case.images)
    batches = made_up_batch(
        bucket(case), people=PEOPLE, images=case.images * jax.local_device_count()
    )
    batches = on_device(split_over_devices(batches))
    forward_pass = partial(forward, step.model, train=True)
    forward_call = compiled(forward_pass, state.params, state.frozen, on_device(batch))[1]
    cost = _cost(config, case, state, batches)
    state = replicate(jax.tree.map(jnp.copy, state))  # its buffers are reused
    program = parallel_train_step(step).lower(state, batches).compile()

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, batches)
        return metrics

    return Step(run, forward_call, peak_memory(program), cost)


def bucket(case: Case) -> Size:
    """The landscape bucket of a case's scale."""
    return min(buckets([case.scale]))


def _step_and_state(config: ConfigDict, case: Case) -> tuple[TrainStep, TrainState]:
    model = build_model(config)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1000)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    state = create_state(config, model, optimizer, IDENTITIES)
    params, frozen = plausible_weights(model)
    positives = POSITIVES_PER_LEVEL * PEOPLE * case.images
    step = TrainStep(model, optimizer, config.loss, positives)
    return step, state.replace(params=params, frozen=frozen)


def _cost(config: ConfigDict, case: Case, state: TrainState, batches: Batch) -> Cost:
    """What the step costs with plain convolutions and nothing computed twice."""
    config = ConfigDict(config.to_dict())
    config.model.remat = False
    with plain_arithmetic():
        step, _ = _step_and_state(config, case)
        return program_cost(parallel_train_step(step), state, batches)


def _torch_step(context: Context, config: ConfigDict, case: Case) -> Callable[[], object]:
    """The released training step in PyTorch on the same images and people, P3 only."""
    from tests.oracle.training_torch import Trainer

    torch, device = context.torch, context.torch_device
    config.loss.lut_size = IDENTITIES
    network = torch_network(context, config, *plausible_weights(build_model(config))).train()
    trainer = Trainer(network, weight_decay=config.optimizer.weight_decay, warmup=300, drops=())
    batch = made_up_batch(bucket(case), people=PEOPLE, images=case.images)
    pixels = torch_pixels(context, config, batch)
    identity = np.where(batch.labeled, batch.identity, -1)
    people = [
        (torch.tensor(boxes, device=device), torch.tensor(who, device=device))
        for boxes, who in zip(batch.boxes, identity, strict=True)
    ]
    return context.finished(partial(trainer.step, pixels, people))
