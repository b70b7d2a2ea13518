"""What a configuration becomes before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.choices import known_name
from alignps_jax.config_rules import check_config
from alignps_jax.devices import PARALLEL
from alignps_jax.evaluation.evaluate import Evaluator, check_batch_size, make_evaluator
from alignps_jax.evaluation.scoring import make_scorer, scorer_of
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.nn.model import AlignPS, build_model
from alignps_jax.peers import first_process_first
from alignps_jax.training.optimizer import (
    Schedule,
    batch_factor,
    learning_rate_schedule,
    make_optimizer,
    steps_of,
)
from alignps_jax.training.pretrained import check_pretrained
from alignps_jax.training.profile import traced_steps
from alignps_jax.training.state import create_state, is_frozen, lut_size, max_positives
from alignps_jax.training.step import TrainStep
from alignps_jax.types import TrainState, UserError
from data_pipeline.datasets import PreparedDataset, dataset_class, load_train, prepare
from data_pipeline.pipeline import TrainPipeline, make_train_pipeline
from data_pipeline.validation import hold_out


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration becomes before the first step."""

    pipeline: TrainPipeline
    plan: Plan
    schedule: Schedule
    step: TrainStep
    # An entry of `PARALLEL`.
    parallel: str
    # Of the test split, and of the split that chooses the best checkpoint: the same one, unless
    # there is a validation split.
    evaluator: Evaluator
    selector: Evaluator
    # Makes the state before the first step; what is pretrained is read only then.
    initial: Callable[[], TrainState]
    # Its structure, shapes and types.
    template: Callable[[], TrainState]


def make_run(config: ConfigDict, model: AlignPS) -> Run:
    """Prepares the data, and builds all that training a rehearsed network takes.

    Raises:
      UserError: something is wrong with the data.
    """
    with first_process_first():  # it may have to draw the data set
        scorer, people = make_scorer(config), load_train(config.data)
    held = None
    if config.data.validation_fraction:
        held = hold_out(people, config.data.validation_fraction, config.seed)
        if jax.process_index() == 0:
            print(held)
    rows = lut_size(config, (held.train if held else people).num_identities)
    with first_process_first():
        data = prepare(config.data)
    evaluator = make_evaluator(config, data.test, scorer)
    selector = evaluator
    if held:
        scorer = scorer_of(config, held.validation.people(people), (held.protocol,))
        split = held.validation.photos(data.train)
        selector = make_evaluator(config, split, scorer, predict=evaluator.predict)
        data = dataclasses.replace(data, train=held.train.photos(data.train))
    pipeline = make_pipeline(config, data)
    if jax.process_index() == 0:
        print(_padding(pipeline))
    steps_per_epoch = pipeline.steps_per_epoch
    schedule, step = make_step(config, model, steps_per_epoch, max_positives(config, pipeline))
    initial = partial(create_state, config, model, step.optimizer, rows)
    return Run(
        pipeline=pipeline,
        plan=make_plan(config, steps_per_epoch),
        schedule=schedule,
        step=step,
        parallel=config.train.parallel,
        evaluator=evaluator,
        selector=selector,
        initial=initial,
        template=partial(jax.eval_shape, partial(initial, pretrained=False)),
    )


def rehearse(config: ConfigDict, resumes: bool = False) -> AlignPS:
    """Builds all that needs no data, so that what is wrong costs a second; returns the network.

    A run that `resumes` has no need of the weights that it started from.

    Raises:
      UserError: a field of the configuration is wrong, or the weights to start from do not fit.
    """
    check_config(config)
    check_batch_size(config, "train")
    check_batch_size(config, "eval")
    _check_parts(config)
    if config.train.profile:
        traced_steps(config.train.profile)
    known_name("config.train.parallel", config.train.parallel, PARALLEL)
    dataset_class(config.data.name)
    model = build_model(config)
    make_step(config, model, steps_per_epoch=1, positives=1)
    make_predict_step(config)
    if not resumes:
        check_pretrained(config)
    return model


def _check_parts(config: ConfigDict) -> None:
    parts, images = config.train.accumulate, config.train.batch_size // jax.device_count()
    if images % parts:
        raise UserError(
            f"config.train.accumulate: found {parts}, expected a divisor of the {images} images "
            "that each device takes of config.train.batch_size"
        )


def make_step(
    config: ConfigDict, model: AlignPS, steps_per_epoch: int, positives: int
) -> tuple[Schedule, TrainStep]:
    """The learning rate's course, and the training step with its optimizer."""
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, batch_factor(config))
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    step = TrainStep(
        model,
        optimizer,
        config.loss,
        positives,
        precision=config.model.precision,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
    )
    return schedule, step


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of `config.train` in steps."""

    total: int
    checkpoint_every: int
    eval_every: int
    log_every: int

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.evaluates_at(step) or step % self.checkpoint_every == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after this step; there is one at the end."""
        return step == self.total or (step > 0 and step % self.eval_every == 0)


def make_plan(config: ConfigDict, steps_per_epoch: int) -> Plan:
    """Reads the durations; UserError if one is malformed or comes to no step at all."""

    def steps(name: str) -> int:
        found = steps_of(f"config.train.{name}", config.train[name], steps_per_epoch)
        if found < 1:
            raise UserError(f"config.train.{name}: found {config.train[name]!r}, which is no step")
        return found

    return Plan(
        total=steps("duration"),
        checkpoint_every=steps("checkpoint_every"),
        eval_every=steps("eval_every"),
        log_every=config.train.log_every_steps,
    )


def _padding(pipeline: TrainPipeline, batches: int = 100) -> str:
    """A line on what the batches are padded to, and how much of the first ones is padding."""
    plans = [pipeline.plan(step) for step in range(min(batches, pipeline.steps_per_epoch))]
    pixels = [plan.bucket[0] * plan.bucket[1] for plan in plans]
    share = np.average([plan.padding for plan in plans], weights=pixels)
    return (
        f"buckets: {len(pipeline.buckets)} shapes for {len(pipeline.groups)} groups of images; "
        f"{share:.1%} of the pixels of the first batches are padding"
    )


def make_pipeline(config: ConfigDict, data: PreparedDataset) -> TrainPipeline:
    """The training batches of this process."""
    return make_train_pipeline(
        data.train,
        config.data,
        seed=config.seed,
        batch_size=config.train.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
