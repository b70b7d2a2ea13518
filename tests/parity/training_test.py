"""The training step and the optimiser against the PyTorch oracle (`make parity`)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch", reason="make parity runs these")
pytest.importorskip("torchvision", reason="make parity runs these")

import torch

from alignps_jax.checkpoint import load_arrays
from alignps_jax.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.released_names import released_name, to_torch
from alignps_jax.train import is_frozen
from alignps_jax.train_step import AXIS, TrainStep
from alignps_jax.types import Batch, OIMMemory, TrainState
from tests.oracle.scenes import make_scene
from tests.oracle.training_torch import Trainer, losses, update_memory
from tests.parity.common import MODELS, Pair, make_pair, normalise, relative_error

SIZE = (250, 310)  # fed as 256 x 320
SMALL = (122, 154)  # fed as 128 x 160
NARROW = {"width": 16, "channels": 96, "groups": 8}
RULES = {"warmup": 4, "drops": (3, 12)}


def make_batch(seed: int, size: tuple[int, int]) -> tuple[Batch, torch.Tensor, list]:
    """A scene for us, and its pixels and people for the oracle."""
    scene = make_scene(seed, 40, size)
    ids = np.where(scene.labelled, scene.identity, -1)
    people = zip(torch.from_numpy(scene.boxes), torch.from_numpy(ids), strict=True)
    return scene.batch(), normalise(scene.images, scene.size), list(people)


def initial_memory(pair: Pair) -> OIMMemory:
    """What the conversion brought over, the tail near the queue's end."""
    arrays = load_arrays(pair.workdir, lambda name: name.startswith("memory/"))
    memory = OIMMemory(**{name.removeprefix("memory/"): a for name, a in arrays.items()})
    tail = len(memory.queue) - 2
    pair.oracle.bbox_head.unlabeled_matching_layer.tail.fill_(tail)
    return memory.replace(tail=jnp.asarray(tail, jnp.int32))


def one_device(step: TrainStep):
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=jax.local_devices()[:1]
    )


def start(pair: Pair, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=pair.weights.params,
        frozen=pair.weights.frozen,
        opt_state=optimizer.init(pair.weights.params),
        memory=initial_memory(pair),
        rng=jax.random.key(0),
    )


def named(tree, collection: str = "params") -> dict[str, np.ndarray]:
    """The leaves by released name, in PyTorch's layout."""
    leaves = jax.tree.leaves_with_path({collection: tree})
    return {
        released_name(jax.tree_util.keystr(path, simple=True, separator="/")): to_torch(
            np.asarray(leaf)
        )
        for path, leaf in leaves
    }


def compare_memory(pair: Pair, memory: OIMMemory, tolerance: float) -> dict[str, float]:
    head = pair.oracle.bbox_head
    lut, queue = head.labeled_matching_layer.lookup_table, head.unlabeled_matching_layer.queue
    errors = {
        "lut": relative_error(memory.lut, lut.numpy()),
        "queue": relative_error(memory.queue, queue.numpy()),
    }
    assert int(memory.tail) == int(head.unlabeled_matching_layer.tail)
    assert max(errors.values()) <= tolerance
    return errors


def record_gradients() -> optax.GradientTransformation:
    """Updates nothing; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_memory(name, tmp_path):
    pair = make_pair(name, tmp_path)
    optimizer = record_gradients()
    step = one_device(TrainStep(pair.model, optimizer, pair.config.loss, 100))
    state = start(pair, optimizer)
    batch, pixels, people = make_batch(3, SIZE)
    for turn in range(2):
        terms, embeddings, identity = losses(pair.oracle, pixels, people)
        pair.oracle.zero_grad()
        sum(terms.values()).backward()
        update_memory(pair.oracle, embeddings, identity)
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
        assert metrics.positives == len(identity)
        assert (identity >= 0).any()
        assert (identity < 0).sum() > 2
        assert set(metrics.terms) == set(terms)
        found = {key: relative_error(metrics.terms[key], terms[key].item()) for key in terms}
        print(f"\n{name} step {turn + 1}:", {key: f"{terms[key].item():.4f}" for key in terms})
        print("losses", {key: f"{error:.1e}" for key, error in found.items()})
        assert max(found.values()) <= 1e-4
        memory = compare_memory(pair, state.memory, 1e-4)
        print("memory", {key: f"{error:.1e}" for key, error in memory.items()})
        gradient = named(state.opt_state)
        errors, norms = {}, {}
        for key, parameter in pair.oracle.named_parameters():
            if parameter.grad is not None:
                norms[key] = (np.linalg.norm(gradient[key]), float(parameter.grad.norm()))
                errors[key] = relative_error(gradient[key], parameter.grad.numpy())
            elif key in gradient:  # frozen
                np.testing.assert_array_equal(gradient[key], 0)
        norm_error = max(abs(ours - theirs) / theirs for ours, theirs in norms.values())
        worst = max(errors, key=errors.get)
        print(
            f"{len(norms)} gradients: norms {norm_error:.1e}, worst tensor {worst} "
            f"{errors[worst]:.1e}; smallest norm {min(n for _, n in norms.values()):.1e}"
        )
        assert len(norms) > 100
        assert norm_error <= 1e-3
        assert errors[worst] <= 1e-2


@pytest.mark.parametrize(
    ("name", "widths"), [("cuhk", {}), *((name, NARROW) for name in MODELS)], ids=str
)
def test_twenty_steps_of_the_optimiser(name, widths, tmp_path):
    pair = make_pair(name, tmp_path, gentle=True, **widths)
    config = pair.config.optimizer
    config.warmup = f"{RULES['warmup']} steps"
    config.drops = tuple(f"{step} steps" for step in RULES["drops"])
    schedule = learning_rate_schedule(config, steps_per_epoch=1)
    optimizer = make_optimizer(config, schedule, partial(is_frozen, pair.model))
    step = one_device(TrainStep(pair.model, optimizer, pair.config.loss, 100))
    state = start(pair, optimizer)
    before = {key: value.clone() for key, value in pair.oracle.state_dict().items()}
    trainer = Trainer(pair.oracle, weight_decay=config.weight_decay, **RULES)
    batches = [make_batch(seed, SMALL) for seed in (3, 4)]
    clipped = []
    for turn in range(20):
        batch, pixels, people = batches[turn % 2]
        terms = trainer.step(pixels, people)
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
        clipped.append(float(metrics.grad_norm) > config.clip_norm)
        for key, value in terms.items():
            assert relative_error(metrics.terms[key], value) <= 1e-3, (turn, key)

    after = pair.oracle.state_dict()
    found = named(state.params)
    for key, value in named(state.frozen, "frozen").items():
        np.testing.assert_array_equal(value, before[key].numpy(), err_msg=key)
        np.testing.assert_array_equal(value, after[key].numpy(), err_msg=key)
    errors, moved = {}, {}
    for key, value in found.items():
        change = after[key] - before[key]
        if not change.any():
            np.testing.assert_array_equal(value, before[key].numpy(), err_msg=key)
            continue
        errors[key] = relative_error(value, after[key].numpy())
        moved[key] = relative_error(value - before[key].numpy(), change.numpy())
    memory = compare_memory(pair, state.memory, 1e-3)
    frozen = [key for key in found if key not in errors]
    worst, worst_moved = max(errors, key=errors.get), max(moved, key=moved.get)
    print(
        f"\n{name} {widths or 'full width'}: {len(errors)} parameters {errors[worst]:.1e} "
        f"({worst}), their changes {moved[worst_moved]:.1e} ({worst_moved}), {len(frozen)} frozen, "
        f"memory {max(memory.values()):.1e}, {sum(clipped)} of 20 gradients clipped"
    )
    assert errors[worst] <= 1e-3
    assert all(key.startswith(("backbone.conv1", "backbone.layer1")) for key in frozen)
    assert any(clipped)
