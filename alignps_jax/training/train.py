"""Training, from the start or from the last whole checkpoint, and the evaluation after it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import (
    Checkpoints,
    load_config,
    load_weights,
    write_run_info,
)
from alignps_jax.config_rules import check_config
from alignps_jax.devices import (
    parallel_train_step,
    replicate,
    split_over_devices,
    use_compilation_cache,
)
from alignps_jax.evaluation.evaluate import (
    Evaluator,
    Measured,
    check_batch_size,
    make_evaluator,
    score_of,
)
from alignps_jax.evaluation.scoring import make_scorer
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.log import MetricLog
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.training.curves import training_curves
from alignps_jax.training.monitor import Interrupt, Monitor
from alignps_jax.training.optimizer import (
    Schedule,
    learning_rate_schedule,
    make_optimizer,
    steps_of,
)
from alignps_jax.training.pretrained import check_pretrained
from alignps_jax.training.state import create_state, is_frozen, lut_size, max_positives
from alignps_jax.training.step import TrainStep
from alignps_jax.types import TrainState, UserError
from data_pipeline.datasets import PreparedDataset, dataset_class, load_train, prepare
from data_pipeline.pipeline import TrainPipeline, make_train_pipeline


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains as `config` says, resuming from what `workdir` holds, and evaluates the result.

    Everything that can be wrong is found before the data set is prepared, and a run that is refused
    stays as it is.

    Raises:
      UserError: something is wrong with the configuration, the data or an earlier checkpoint.
      SystemExit: SIGTERM came and the state was saved (exit code 0).
    """
    use_compilation_cache(workdir / "xla_cache")
    run = make_run(config)
    pipeline, plan, evaluator, schedule = run.pipeline, run.plan, run.evaluator, run.schedule
    step_fn = parallel_train_step(run.step)
    with (
        Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints,
        MetricLog(log_folder(workdir)) as log,
        Interrupt() as interrupt,
    ):
        batches = pipeline.iterator(plan.total)
        state = restore(run.initial, batches, checkpoints, log, config, workdir)
        write_run_info(workdir, config)
        start = int(state.step)
        # Donation takes the buffers of `state`; those of `run.initial` are needed again.
        state = replicate(jax.tree.map(jnp.copy, state))

        def evaluate(state: TrainState) -> Measured:
            measured = evaluator.measure(state.params, state.frozen, int(state.step))
            evaluator.log(measured, log)
            checkpoints.save(state, batches.get_state(), score=score_of(measured.result))
            return measured

        with Monitor(
            pipeline, schedule, log, start=start, total=plan.total, log_every=plan.log_every
        ) as monitor:
            for step in range(start + 1, plan.total + 1):
                batch = monitor.next_batch(batches)
                state, metrics = step_fn(state, split_over_devices(batch))
                monitor.record(step, metrics)
                stop = interrupt.wanted(step)
                evaluate_now = step % plan.eval_every == 0 and step < plan.total
                if stop or evaluate_now or step % plan.checkpoint_every == 0 or step == plan.total:
                    # A state is saved only once its loss is known to be finite.
                    monitor.flush()
                    checkpoints.save(state, batches.get_state())
                if stop:
                    checkpoints.wait()
                    monitor.say(f"SIGTERM: step {step} is saved; the same command resumes from it")
                    raise SystemExit(0)
                if evaluate_now:
                    evaluate(state)
                    monitor.restart_clock()
        trained = best_of(evaluate(state), checkpoints, run, workdir)
    before = config.eval.untrained_baseline
    untrained = evaluator.measure(run.initial.params, run.initial.frozen, 0) if before else None
    evaluator.write(trained, untrained, workdir)
    if jax.process_index() == 0:
        curves = workdir / "curves.png"
        training_curves(workdir / "log.jsonl", curves)
        print(f"curves      {curves}")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration becomes before the first step."""

    pipeline: TrainPipeline
    plan: Plan
    schedule: Schedule
    step: TrainStep
    initial: TrainState
    evaluator: Evaluator


def make_run(config: ConfigDict) -> Run:
    """Checks the configuration, then prepares the data, and builds all that training takes.

    Raises:
      UserError: as `train_and_evaluate`.
    """
    model = rehearse(config)
    scorer = make_scorer(config)
    rows = lut_size(config, load_train(config.data).num_identities)
    data = prepare(config.data)
    pipeline = make_pipeline(config, data)
    steps_per_epoch = pipeline.steps_per_epoch
    schedule, step = make_step(config, model, steps_per_epoch, max_positives(config, pipeline))
    return Run(
        pipeline=pipeline,
        plan=make_plan(config, steps_per_epoch),
        schedule=schedule,
        step=step,
        initial=create_state(config, model, step.optimizer, rows),
        evaluator=make_evaluator(config, model, data.test, scorer),
    )


def rehearse(config: ConfigDict) -> AlignPS:
    """Builds all that needs no data, so that what is wrong costs a second; returns the network.

    Raises:
      UserError: a field of the configuration is wrong, or the weights to start from do not fit.
    """
    check_config(config)
    check_batch_size(config, "train")
    check_batch_size(config, "eval")
    dataset_class(config.data.name)
    model = build_model(config)
    make_step(config, model, steps_per_epoch=1, positives=1)
    make_predict_step(model, config)
    check_pretrained(config)
    return model


def make_step(
    config: ConfigDict, model: AlignPS, steps_per_epoch: int, positives: int
) -> tuple[Schedule, TrainStep]:
    """The learning rate's course, and the training step with its optimizer."""
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, partial(is_frozen, model))
    return schedule, TrainStep(model, optimizer, config.loss, positives, config.model.precision)


def best_of(last: Measured, checkpoints: Checkpoints, run: Run, workdir: Path) -> Measured:
    """The evaluation of the run's best checkpoint, which is what other modes take.

    That is the one with the highest search mAP on the test split, as is common on these data sets.
    """
    checkpoints.wait()
    best = load_weights(workdir, weights_template(run.step.model))
    step = int(best.step)
    if step == last.result.step:
        return last
    if jax.process_index() == 0:
        print(f"best: step {step}, by search mAP on the test split; last: {last.result.step}")
    return run.evaluator.measure(best.params, best.frozen, step)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of `config.train` in steps."""

    total: int
    checkpoint_every: int
    eval_every: int
    log_every: int


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


def restore(
    initial: TrainState,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    log: MetricLog,
    config: ConfigDict,
    workdir: Path,
) -> TrainState:
    """The state of the newest whole checkpoint, with batches and log brought to the same step."""
    latest = checkpoints.latest_step()
    if latest is None:
        log.truncate_after(-1)
        return initial
    before = load_config(workdir, latest).to_dict()
    for section, fields in config.to_dict().items():
        if fields != before.get(section):
            print(f"note: config.{section} is not what {workdir} was started with")
    state, iterator_state = checkpoints.restore(initial)
    if iterator_state is not None:  # converted weights have seen no data
        batches.set_state(iterator_state)
    log.truncate_after(latest)
    print(f"resuming from step {latest} in {workdir}")
    return state


def log_folder(workdir: Path) -> Path:
    """Where this process logs: the first one in the workdir, the others in folders of their own."""
    process = jax.process_index()
    return workdir / f"process_{process}" if process else workdir
