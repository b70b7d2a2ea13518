"""Training, from the start or from the last complete checkpoint, and the evaluation after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from contextlib import closing
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alignps_jax import devices
from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.checkpoint.places import agreed_step, holds_checkpoint
from alignps_jax.checkpoint.store import Checkpoints, load_weights, write_run_info
from alignps_jax.config import check_fields, flat_fields
from alignps_jax.distributed import barrier, broadcast_from_main, is_main_process
from alignps_jax.evaluation.evaluate import OUTPUTS, Measured, check_batch_size
from alignps_jax.files import check_outputs
from alignps_jax.log import MetricLog
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.curves import training_curves
from alignps_jax.training.monitor import Monitor
from alignps_jax.training.preemption import Preemption
from alignps_jax.training.pretrained import starting_arrays, starting_config
from alignps_jax.training.setup import Run, check_changes, make_run, restore
from alignps_jax.types import TrainState

CURVES = "curves.png"


def train_and_evaluate(
    config: ConfigDict, workdir: Path, accept_changes: bool = False, typed: Collection[str] = ()
) -> None:
    """Trains as `config` says, resuming from what `workdir` holds, and evaluates the result.

    A run that is refused stays as it is. With `accept_changes`, one resumes with other settings
    than it was begun with. `typed` are the dotted names of the fields that the command line sets.

    Raises UserError if the configuration, the data or an earlier checkpoint is wrong, or another
    run writes to `workdir`; SystemExit if SIGTERM, SIGHUP or Ctrl-C came, and the state was saved.
    """
    check_fields(flat_fields(config))
    config = starting_config(config, workdir, typed)
    if is_main_process():
        check_outputs(*(workdir / name for name in (*OUTPUTS, CURVES)))
        check_changes(config, workdir, accept_changes)
    check_batch_size(config, "train", config.train.accumulate)
    check_batch_size(config, "eval")
    model = build_model(config)
    resumes = broadcast_from_main(holds_checkpoint(workdir))
    weights = None if resumes else starting_arrays(config, model)
    with one_writer(workdir):
        devices.use_compilation_cache(workdir / "xla_cache")
        run = make_run(config, model)
        batches = run.pipeline.iterator(run.plan.total)
        with (
            Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints,
            MetricLog(workdir) as log,
        ):
            state = restore(run.create, batches, checkpoints)
            state = state or run.create(weights or starting_arrays(config, model))
            write_run_info(workdir, config)
            last = train(run, state, batches, checkpoints, log)
        trained, untrained = reported(last, run, config, workdir), None
        if config.eval.untrained_baseline:
            initial = run.create(weights or starting_arrays(config, model))
            untrained = run.evaluator.measure(initial.params, initial.frozen, 0).metrics
        run.evaluator.write(trained, untrained, workdir)
        if is_main_process():
            training_curves(workdir / "log.jsonl", workdir / CURVES)
            print(f"curves      {workdir / CURVES}")


def train(
    run: Run,
    state: TrainState,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    log: MetricLog,
) -> Measured:
    """Trains from `state` to the last step, and evaluates where it is due.

    An evaluation that was due at `state`, but did not come to its score, is made up for.
    """
    plan, start = run.plan, int(state.step)
    due = plan.evaluates_at(start) and not checkpoints.has_score(start)
    log.truncate_after(start, again="eval/" if due or start >= plan.total else ())
    train_step = devices.parallel_train_step(run.step)
    # A copy, whose buffers the step may take, made by one program.
    state = devices.replicate(jax.jit(partial(jax.tree.map, jnp.copy))(state))
    with closing(Monitor(run, log, start)) as monitor:
        while start < plan.total:
            if due:
                evaluate(run, state, checkpoints, log)
                monitor.restart_clock()
            with Preemption() as preemption:
                for step in range(start + 1, plan.total + 1):
                    batch = monitor.next_batch(batches, step)
                    state, metrics = train_step(state, devices.split_over_devices(batch))
                    monitor.record(step, metrics)
                    exit_code = preemption.exit_code(step)
                    if exit_code or plan.saves_at(step):
                        # A state is saved only once its loss is known to be finite.
                        monitor.flush()
                        checkpoints.save(state, batches.get_state())
                    if exit_code:
                        checkpoints.wait()
                        barrier("saved")
                        monitor.say(f"step {step} is saved; the same command resumes from it")
                        raise SystemExit(exit_code)
                    if plan.evaluates_at(step):
                        break
                checkpoints.wait()
            start, due = step, True
    return evaluate(run, state, checkpoints, log)


def evaluate(run: Run, state: TrainState, checkpoints: Checkpoints, log: MetricLog) -> Measured:
    """Evaluates a state that is saved, on `run.selector`'s split, and adds its score there."""
    measured = run.selector.measure(state.params, state.frozen, int(state.step))
    run.selector.log(measured, log)
    checkpoints.save(state, None, score=measured.score)
    return measured


def reported(last: Measured, run: Run, config: ConfigDict, workdir: Path) -> Measured:
    """The evaluation on the test split of the step that counts (`agreed_step`).

    `last` is the evaluation of the last step during training.
    """
    folder, by = agreed_step(workdir, config)
    step = int(folder.name)
    if step == last.step and run.selector is run.evaluator:
        return dataclasses.replace(last, chosen_by=by, folder=folder)
    if is_main_process():
        print(f"step {step} is reported, chosen by {by}; the last one is {last.step}")
    weights = load_weights(folder, weights_template(run.step.model))
    measured = run.evaluator.measure(weights.params, weights.frozen, step)
    return dataclasses.replace(measured, chosen_by=by, folder=folder)
