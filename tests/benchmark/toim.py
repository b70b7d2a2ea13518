"""TOIM: the OIM and triplet losses, their gradient, and the update of the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignps_jax.experiments.benchmark.measure import peak_memory, time_in_turns
from alignps_jax.experiments.benchmark.report import seconds
from alignps_jax.losses.oim import oim_loss, update_memory
from alignps_jax.losses.terms import triplet_loss
from alignps_jax.types import OIMMemory, Positives
from tests.benchmark.measure import Context, Row
from tests.benchmark.network import configured
from tests.benchmark.train import CASES, IDENTITIES, PEOPLE, QUICK_CASES, Case, make_step

GOAL = "≤ 2% of the training step"
POSITIVES_PER_LEVEL = 9  # with the radius of the paper
IMAGES = 4
QUICK_IDENTITIES = 100
# People per image for whom the step has room: as many as there are, or as in the fullest image.
ROOMS = (PEOPLE, 5 * PEOPLE)


def rows(context: Context) -> Iterator[Row]:
    """TOIM of a batch of four against a training step of two; with more and more empty rows."""
    for room in ROOMS:
        positives, memory = made_up_people(context, room)
        run, peak = make_work(context, positives, memory)
        functions = {"ours": run}
        if context.torch is not None:
            functions["torch"] = torch_function(context, positives, memory)
        times = time_in_turns(functions, runs=context.runs)
        notes = [share_of_step(context, times["ours"].median, step_seconds), context.torch_note]
        yield Row(
            part="toim",
            name=f"{int(positives.valid.sum())} positives in {len(positives.valid)} rows",
            time=times["ours"],
            torch=times.get("torch"),
            goal=GOAL,
            note="; ".join(filter(None, notes)),
            memory=peak,
        )


def share_of_step(
    context: Context, time: float, measure_step: Callable[[Context, Case], float]
) -> str:
    """How much of the first case of part `train` this is; its time is measured once if need be.

    A quick run says nothing of a step that it has not met: compiling one takes minutes.
    """
    case, known = (QUICK_CASES if context.quick else CASES)[0], context.step_seconds
    if case.title not in known:
        if context.quick:
            return ""
        known[case.title] = measure_step(context, case)
    step_time = known[case.title]
    return f"{time / step_time:.2%} of a training step ({case.title}: {seconds(step_time)})"


def step_seconds(context: Context, case: Case) -> float:
    """What one training step of the case takes."""
    step = make_step(configured(context), case)
    return time_in_turns({"step": step.run}, runs=1)["step"].median


def made_up_people(context: Context, room: int) -> tuple[Positives, OIMMemory]:
    """Positive locations of `PEOPLE` per image, two thirds of them labeled, and a full memory.

    The rows have room for that many people per image; the rest is masked.
    """
    config, rng = configured(context), np.random.default_rng(0)
    channels, queue_size = config.model.channels, config.loss.queue_size
    identities = QUICK_IDENTITIES if context.quick else IDENTITIES

    def unit(count: int) -> Float[np.ndarray, "N D"]:
        vectors = rng.normal(size=(count, channels)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    size, people = IMAGES * room * POSITIVES_PER_LEVEL, IMAGES * PEOPLE
    used = np.arange(size) < people * POSITIVES_PER_LEVEL
    person = np.minimum(np.arange(size) // POSITIVES_PER_LEVEL, people - 1)
    identity = rng.choice(identities, people, replace=False)[person].astype(np.int32)
    positives = Positives(
        valid=used,
        distances=np.zeros((size, 4), np.float32),
        centerness_logits=np.zeros(size, np.float32),
        embeddings=rng.normal(size=(size, channels)).astype(np.float32),
        target_distances=np.zeros((size, 4), np.float32),
        target_centerness=np.zeros(size, np.float32),
        identity=identity,
        labeled=(person % 3 > 0) & used,
    )
    memory = OIMMemory(
        lut=unit(identities), queue=unit(queue_size), tail=np.array(queue_size - 2, np.int32)
    )
    return jax.tree.map(jnp.asarray, (positives, memory))


def make_work(
    context: Context, positives: Positives, memory: OIMMemory
) -> tuple[Callable[[], Any], float]:
    """Losses, gradient and update, resuming from the memory that the last run left; its bytes."""
    loss = configured(context).loss

    def toim(memory: OIMMemory, positives: Positives) -> tuple[Float[Array, "P D"], OIMMemory]:
        def total(embeddings: Float[Array, "P D"]) -> Float[Array, ""]:
            people = dataclasses.replace(positives, embeddings=embeddings)
            oim = oim_loss(
                people,
                memory,
                inverse_lut_temperature=loss.inverse_lut_temperature,
                inverse_queue_temperature=loss.inverse_queue_temperature,
                focal_gamma=loss.oim_focal_gamma,
            )
            triplet = triplet_loss(
                people,
                people,
                memory.lut,
                offset=0,
                margin=loss.triplet_margin,
                first_lut_identity=loss.triplet_first_lut_identity,
            )
            return oim.sum / oim.count + triplet.sum / triplet.count

        updated = update_memory(
            memory,
            positives,
            momentum=loss.lut_momentum,
            normalize=loss.normalize_lut,
            queue_channels=loss.queue_channels,
        )
        return jax.grad(total)(positives.embeddings), updated

    program = jax.jit(toim, donate_argnums=0).lower(memory, positives).compile()
    memory = jax.tree.map(jnp.copy, memory)  # its buffers are reused

    def run() -> Any:
        nonlocal memory
        gradient, memory = program(memory, positives)
        return gradient, memory

    return run, peak_memory(program)


def torch_function(
    context: Context, positives: Positives, memory: OIMMemory
) -> Callable[[], object]:
    """The same as the released code does it, for the positives that there are."""
    from tests.oracle.training_torch import oim, triplet
    from tests.oracle.training_torch import update_memory as torch_update

    torch, loss = context.torch, configured(context).loss

    def tensor(array: Array) -> Any:
        return torch.tensor(np.asarray(array), device=context.torch_device)

    used = np.asarray(positives.valid)
    embeddings = tensor(positives.embeddings[used]).requires_grad_()
    identity = torch.where(
        tensor(positives.labeled[used]), tensor(positives.identity[used]).long(), -1
    )
    table = SimpleNamespace(lookup_table=tensor(memory.lut))
    queue = SimpleNamespace(queue=tensor(memory.queue), tail=tensor(memory.tail))
    head = SimpleNamespace(labeled_matching_layer=table, unlabeled_matching_layer=queue)
    model = SimpleNamespace(bbox_head=head, spec=SimpleNamespace(normalize_lut=loss.normalize_lut))

    def run() -> Any:
        normal = torch.nn.functional.normalize(embeddings, dim=1)
        total = oim(normal, identity, table.lookup_table, queue.queue, loss.inverse_lut_temperature)
        known = identity >= 0
        total = total + triplet(normal[known], identity[known], table.lookup_table)
        gradient = torch.autograd.grad(total, embeddings)
        with torch.no_grad():
            torch_update(model, normal, identity)
        return gradient

    return context.finished(run)
