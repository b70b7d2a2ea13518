"""What a configuration and a workdir become before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.places import holds_checkpoint, last_step
from alignps_jax.checkpoint.store import Checkpoints, load_config
from alignps_jax.config import FIELDS, NETWORK, TRAINING, flat_fields, steps_of
from alignps_jax.distributed import is_main_process, main_process_first
from alignps_jax.evaluation.evaluate import Evaluator, make_evaluator
from alignps_jax.evaluation.scoring import Scorer, make_scorer
from alignps_jax.losses.oim import init_memory
from alignps_jax.nn.model import AlignPS, init_variables
from alignps_jax.training import optimizer
from alignps_jax.training.pretrained import Arrays
from alignps_jax.training.step import TrainStep
from alignps_jax.types import TrainState, UserError
from data_pipeline.datasets import load_train, prepare
from data_pipeline.pipeline import TrainPipeline, make_train_pipeline
from data_pipeline.validation import hold_out


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a run saves, evaluates, logs and ends, in steps; `profile` as in the configuration."""

    total: int
    checkpoint_every: int
    eval_every: int
    log_every: int
    profile: str | None = None

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.evaluates_at(step) or step % self.checkpoint_every == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after this step; there is one at the end."""
        return step >= self.total or (step > 0 and step % self.eval_every == 0)

    def logs_at(self, step: int) -> bool:
        """Whether the measurements of this step are logged."""
        return step >= self.total or step % self.log_every == 0


@dataclasses.dataclass(frozen=True)
class Run:
    """The collaborators of a training run."""

    pipeline: TrainPipeline
    plan: Plan
    schedule: optimizer.Schedule
    step: TrainStep
    evaluator: Evaluator  # of the test split
    selector: Evaluator  # during training: of the validation split, if there is one
    create: Callable[..., TrainState]  # the state before the first step, given weights or none


def make_run(config: ConfigDict, model: AlignPS) -> Run:
    """Prepares the data, and builds all that training takes."""
    fraction = config.data.validation_fraction
    with main_process_first():  # it may have to draw or to prepare the data set
        scorer, people = make_scorer(config), load_train(config.data)
        held = hold_out(people, fraction, config.seed) if fraction else None
        rows = lut_size(config, (held.train if held else people).num_identities)
        data = prepare(config.data)
    train = data.split("train")
    photos = held.train.photos(train) if held else train
    selector = evaluator = make_evaluator(config, data.split("test"), scorer)
    if held:
        scorer = Scorer(config, held.validation.people(people), (held.protocol,))
        split = held.validation.photos(train)
        selector = make_evaluator(config, split, scorer, predict=evaluator.predict)
    process = jax.process_index(), jax.process_count()
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    pipeline = make_train_pipeline(photos, config.data, **sizes, process=process)
    if held and is_main_process():
        print(held)
    times, per_epoch = config.train, pipeline.steps_per_epoch
    durations = times.duration, times.checkpoint_every, times.eval_every
    total, save, evaluate = (max(1, steps_of(x, per_epoch)) for x in durations)
    plan = Plan(total, save, evaluate, times.log_every_steps, times.profile)
    images = times.batch_size // jax.device_count()
    positives = images * positives_per_image(config, pipeline.reader.people)
    schedule, step = make_step(config, model, per_epoch, positives)
    create = partial(create_state, config, model, step.optimizer, rows)
    return Run(pipeline, plan, schedule, step, evaluator, selector, create)


def make_step(
    config: ConfigDict, model: AlignPS, steps_per_epoch: int, positives: int
) -> tuple[optimizer.Schedule, TrainStep]:
    """The learning rate's course, and the training step with its optimizer."""
    schedule = optimizer.learning_rate_schedule(
        config.optimizer, steps_per_epoch, config.train.batch_size
    )
    rule = optimizer.make_optimizer(config.optimizer, schedule, partial(optimizer.is_frozen, model))
    others = config.model.precision, config.train.accumulate, config.train.ema_decay, config.seed
    return schedule, TrainStep(model, rule, config.loss, positives, *others)


def positives_per_image(config: ConfigDict, people: int) -> int:
    """Maximum number of positive locations of an image: those in a square around each person."""
    per_level = math.ceil(2 * config.loss.center_radius) ** 2
    return config.train.max_positives or per_level * len(config.model.levels) * people


def lut_size(config: ConfigDict, found: int) -> int:
    """Rows of the lookup table: as configured, which must do, or one per `found` identity."""
    size = found if config.loss.lut_size is None else config.loss.lut_size
    if size < found:
        raise UserError(
            f"config.loss.lut_size: found {size}, expected at least the {found} identities of "
            f"the training set in {config.data.root}"
        )
    return size


def create_state(
    config: ConfigDict,
    model: AlignPS,
    optimizer: optax.GradientTransformation,
    num_identities: int,
    weights: Arrays | None = None,
) -> TrainState:
    """The state before the first step: of `config.seed`, with the `weights` to start from."""
    params, frozen = init_variables(model, jax.random.key(config.seed))
    if weights:
        tree = {"params": params, "frozen": frozen}
        flat = leaves_by_path(tree)
        flat |= {name: jnp.asarray(array, flat[name].dtype) for name, array in weights.items()}
        tree = jax.tree.unflatten(jax.tree.structure(tree), flat.values())
        params, frozen = tree["params"], tree["frozen"]
    memory = init_memory(num_identities, config.loss.queue_size, config.model.channels)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(params),  # one program, not one for each shape
        memory=memory,
        raw=params if config.train.ema_decay is not None else None,
        roi_memory=jax.tree.map(jnp.copy, memory) if config.model.roi else None,
    )


def check_changes(config: ConfigDict, workdir: Path, accepted: bool) -> None:
    """Prints how `config` differs from that of the newest checkpoint in `workdir`.

    Raises UserError for a change that training feels, unless it was `accepted`.
    """
    if not holds_checkpoint(workdir):
        return
    before, now = (flat_fields(x) for x in (load_config(last_step(workdir)), config))
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    decisive = [n for n in changed if n not in FIELDS or FIELDS[n][0] in (NETWORK, TRAINING)]
    if decisive and not accepted:
        told = (f"config.{n}: found {now.get(n)!r}, expected {before.get(n)!r}" for n in decisive)
        raise UserError(
            f"{workdir}: its last checkpoint was trained otherwise: {'; '.join(told)}; resume with "
            "the old values, with the new ones (--accept_changes), or choose another --workdir"
        )
    for name in changed:
        print(f"note: config.{name} is now {now.get(name)!r}, before {before.get(name)!r}")


def restore(
    create: Callable[[], TrainState], batches: grain.DatasetIterator, checkpoints: Checkpoints
) -> TrainState | None:
    """The newest state, like that of `create`, with the batches brought to its step, if any."""
    if checkpoints.latest_step() is None:
        return None
    state, iterator_state = checkpoints.restore(jax.eval_shape(create))
    if iterator_state is not None:  # converted weights have seen no data
        batches.set_state(iterator_state)
    if is_main_process():
        print(f"resuming from step {int(state.step)}", flush=True)
    return state
