"""What a configuration becomes before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from ml_collections import ConfigDict

from alignps_jax.config import steps_of
from alignps_jax.distributed import is_main_process, main_process_first
from alignps_jax.evaluation.evaluate import Evaluator, check_batch_size, make_evaluator
from alignps_jax.evaluation.scoring import Scorer, make_scorer
from alignps_jax.nn.model import AlignPS, build_model
from alignps_jax.training import optimizer
from alignps_jax.training.pretrained import starting_arrays
from alignps_jax.training.state import create_state, is_frozen, lut_size, max_positives
from alignps_jax.training.step import TrainStep
from alignps_jax.types import TrainState
from data_pipeline.datasets import load_train, prepare
from data_pipeline.pipeline import TrainPipeline, make_train_pipeline
from data_pipeline.validation import hold_out


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a run saves, evaluates, logs and ends, in steps, and which steps it traces."""

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
    initial: Callable[[], TrainState]  # reads the weights to start from
    template: Callable[[], TrainState]  # its structure, shapes and types


def validate(config: ConfigDict, resumes: bool = False) -> AlignPS:
    """Finds what rules of fields cannot know, before data is prepared; returns the network.

    A run that `resumes` does not read the weights that it started from.
    """
    check_batch_size(config, "train", config.train.accumulate)
    check_batch_size(config, "eval")
    model = build_model(config)
    if not resumes:
        starting_arrays(config, model)
    return model


def make_run(config: ConfigDict, model: AlignPS) -> Run:
    """Prepares the data, and builds all that training a validated network takes."""
    fraction = config.data.validation_fraction
    with main_process_first():  # it may have to draw or to prepare the data set
        scorer, people = make_scorer(config), load_train(config.data)
        held = hold_out(people, fraction, config.seed) if fraction else None
        rows = lut_size(config, (held.train if held else people).num_identities)
        data = prepare(config.data)
    photos = data.train
    selector = evaluator = make_evaluator(config, data.test, scorer)
    if held:
        scorer = Scorer(config, held.validation.people(people), (held.protocol,))
        split = held.validation.photos(photos)
        selector = make_evaluator(config, split, scorer, predict=evaluator.predict)
        photos = held.train.photos(photos)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    pipeline = make_train_pipeline(photos, config.data, **sizes, **process)
    if is_main_process():
        print(*filter(None, (held, pipeline.summary())), sep="\n")
    times, per_epoch = config.train, pipeline.steps_per_epoch
    durations = times.duration, times.checkpoint_every, times.eval_every
    total, save, evaluate = (max(1, steps_of(x, per_epoch)) for x in durations)
    schedule, step = make_step(config, model, per_epoch, max_positives(config, pipeline))
    create = partial(create_state, config, model, step.optimizer, rows)
    return Run(
        pipeline=pipeline,
        plan=Plan(total, save, evaluate, times.log_every_steps, times.profile),
        schedule=schedule,
        step=step,
        evaluator=evaluator,
        selector=selector,
        initial=lambda: create(starting_arrays(config, model, say=is_main_process())),
        template=partial(jax.eval_shape, create),
    )


def make_step(
    config: ConfigDict, model: AlignPS, steps_per_epoch: int, positives: int
) -> tuple[optimizer.Schedule, TrainStep]:
    """The learning rate's course, and the training step with its optimizer."""
    schedule = optimizer.learning_rate_schedule(
        config.optimizer, steps_per_epoch, config.train.batch_size
    )
    rule = optimizer.make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    others = config.model.precision, config.train.accumulate, config.train.ema_decay
    return schedule, TrainStep(model, rule, config.loss, positives, *others)
