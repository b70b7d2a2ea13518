"""Training, from the start or from the last complete checkpoint, and the evaluation after it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alignps_jax import devices
from alignps_jax.checkpoint.choice import agreed_step
from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import Checkpoints, load_weights, write_run_info
from alignps_jax.config import check_config
from alignps_jax.distributed import barrier, broadcast_from_main, is_main_process
from alignps_jax.evaluation.evaluate import OUTPUTS, Measured, score_of
from alignps_jax.files import check_outputs
from alignps_jax.log import MetricLog
from alignps_jax.nn.model import weights_template
from alignps_jax.training.curves import training_curves
from alignps_jax.training.monitor import Monitor
from alignps_jax.training.preemption import Preemption
from alignps_jax.training.pretrained import starting_config
from alignps_jax.training.resume import check_changes, restore
from alignps_jax.training.setup import Run, make_run, validate
from alignps_jax.types import TrainState, UserError

CURVES = "curves.png"


def train_and_evaluate(
    config: ConfigDict,
    workdir: Path,
    accept_changes: bool = False,
    typed: Collection[str] = (),
) -> None:
    """Trains as `config` says, resuming from what `workdir` holds, and evaluates the result.

    Everything that can be wrong is found before the data set is prepared, and a run that is refused
    stays as it is. With `accept_changes`, a run resumes with other settings than it was begun with.
    `typed` are the dotted names of the fields that the command line sets.

    Raises:
      UserError: something is wrong with the configuration, the data or an earlier checkpoint, or
        another run writes to `workdir`.
      SystemExit: SIGTERM, SIGHUP or Ctrl-C came, and the state was saved.
    """
    check_config(config)
    config = starting_config(config, workdir, typed)
    if is_main_process():
        check_outputs(*(workdir / name for name in (*OUTPUTS, CURVES)))
        check_changes(config, workdir, accept_changes)
    model = validate(config, resumes=broadcast_from_main(holds_checkpoint(workdir)))
    with one_writer(workdir):
        devices.use_compilation_cache(workdir / "xla_cache")
        run = make_run(config, model)
        with (
            Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints,
            MetricLog(workdir) as log,
        ):
            training = Training(run, checkpoints, log, workdir, config.train.profile)
            state = training.begin()
            write_run_info(workdir, config)
            measured = training.run(state)
            trained = reported(measured, checkpoints, run, config, workdir)
        untrained = measure_untrained(run) if config.eval.untrained_baseline else None
        run.evaluator.write(trained, untrained, workdir)
        if is_main_process():
            curves = workdir / CURVES
            training_curves(workdir / "log.jsonl", curves)
            print(f"curves      {curves}")


class Training:
    """The loop over the training steps, with all that accompanies it."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        log: MetricLog,
        workdir: Path,
        profile: str | None = None,
    ):
        self._run, self._checkpoints, self._log = run, checkpoints, log
        self._workdir, self._profile = workdir, profile
        self._batches = run.pipeline.iterator(run.plan.total)
        self._step = devices.parallel_train_step(run.step)

    def begin(self) -> TrainState:
        """The state to start from, with batches and log brought to its step."""
        state = restore(self._run.template, self._batches, self._checkpoints)
        if state is None:
            self._log.truncate_after(-1)
            return _on_devices(self._run.initial())
        step = int(state.step)
        self._log.truncate_after(step, again="eval/" if self._lacks_score(step) else "")
        if is_main_process():
            print(f"resuming from step {step} in {self._workdir}", flush=True)
        return _on_devices(state)

    def run(self, state: TrainState) -> Measured:
        """Trains from `state` to the last step, and evaluates where it is due.

        An evaluation that was due at `state`, but did not come to its score, is made up for.
        """
        plan, step = self._run.plan, int(state.step)
        with Monitor(
            self._run.pipeline,
            self._run.schedule,
            self._log,
            start=step,
            total=plan.total,
            log_every=plan.log_every,
            profile=self._profile,
            folder=self._workdir / "profile",
        ) as monitor:
            while step < plan.total:
                if self._lacks_score(step):
                    self.evaluate(state)
                    monitor.restart_clock()
                state = self._train(state, monitor)
                step = int(state.step)
        return self.evaluate(state)

    def _train(self, state: TrainState, monitor: Monitor) -> TrainState:
        """Trains up to the next evaluation; all is saved then."""
        plan, checkpoints = self._run.plan, self._checkpoints
        with Preemption() as preemption:
            for step in range(int(state.step) + 1, plan.total + 1):
                batch = monitor.next_batch(self._batches, step)
                state, metrics = self._step(state, devices.split_over_devices(batch))
                monitor.record(step, metrics)
                exit_code = preemption.exit_code(step)
                if exit_code or plan.saves_at(step):
                    # A state is saved only once its loss is known to be finite.
                    monitor.flush()
                    self._log.sync()
                    checkpoints.save(state, self._batches.get_state())
                if exit_code:
                    checkpoints.wait()
                    barrier("saved")
                    monitor.say(f"step {step} is saved; the same command resumes from it")
                    raise SystemExit(exit_code)
                if plan.evaluates_at(step):
                    break
            checkpoints.wait()
        return state

    def evaluate(self, state: TrainState) -> Measured:
        """Evaluates a state that is saved, and adds its score to the checkpoint.

        On the validation split, where there is one, else on the test split.
        """
        measured = self._run.selector.measure(state.params, state.frozen, int(state.step))
        self._run.selector.log(measured, self._log)
        self._log.sync()
        self._checkpoints.save(state, self._batches.get_state(), score=score_of(measured.result))
        return measured

    def _lacks_score(self, step: int) -> bool:
        """Whether an evaluation is due at a step that was saved; the last one is in any case."""
        due = self._run.plan.evaluates_at(step)
        return step >= self._run.plan.total or (due and not self._checkpoints.has_score(step))


def _on_devices(state: TrainState) -> TrainState:
    """A copy whose buffers the training step may take."""
    return devices.replicate(jax.tree.map(jnp.copy, state))


def reported(
    last: Measured, checkpoints: Checkpoints, run: Run, config: ConfigDict, workdir: Path
) -> Measured:
    """The evaluation on the test split of the step that `chosen_step` says.

    `last` is the evaluation of the last step during training.
    """
    checkpoints.wait()
    folder, by = agreed_step(workdir, config)
    step = int(folder.name)
    if step == last.result.step and run.selector is run.evaluator:
        return last.chosen(by)
    if is_main_process():
        print(f"step {step} is reported, chosen by {by}; the last one is {last.result.step}")
    weights = load_weights(folder, weights_template(run.step.model))
    return run.evaluator.measure(weights.params, weights.frozen, step).chosen(by)


def measure_untrained(run: Run) -> Measured | None:
    """The evaluation of the network as it was before training; None if that cannot be had."""
    try:
        initial = run.initial()
    except UserError as error:
        # A resumed run does without the weights that it started from.
        print(f"note: no evaluation of the network before training ({error})")
        return None
    return run.evaluator.measure(initial.params, initial.frozen, 0)
