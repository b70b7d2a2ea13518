"""Training, from the start or from the last complete checkpoint, and the evaluation after it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alignps_jax.checkpoint.choice import agreed_step
from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import Checkpoints, load_weights, write_run_info
from alignps_jax.config_rules import check_config
from alignps_jax.devices import (
    compile_step,
    parallel_train_step,
    replicate,
    split_over_devices,
    use_compilation_cache,
)
from alignps_jax.evaluation.evaluate import OUTPUTS, Measured, score_of
from alignps_jax.files import check_outputs
from alignps_jax.log import MetricLog
from alignps_jax.nn.model import weights_template
from alignps_jax.peers import agree, first_process_first
from alignps_jax.training.curves import training_curves
from alignps_jax.training.interrupt import Interrupt
from alignps_jax.training.monitor import Monitor
from alignps_jax.training.pretrained import starting_config
from alignps_jax.training.profile import Profiler
from alignps_jax.training.programs import Programs
from alignps_jax.training.resume import check_changes, restore
from alignps_jax.training.setup import Run, make_run, validate
from alignps_jax.training.writer import one_writer
from alignps_jax.types import TrainState, UserError
from data_pipeline.transforms import Size, empty_batch

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
      SystemExit: SIGTERM or Ctrl-C came, and the state was saved (exit code 143 or 130).
    """
    check_config(config)
    config = starting_config(config, workdir, typed)
    if jax.process_index() == 0:
        check_outputs(*(workdir / name for name in (*OUTPUTS, CURVES)))
    with one_writer(workdir) as writer, Interrupt(writer) as interrupt:
        with first_process_first():
            use_compilation_cache(workdir / "xla_cache", alone=True)
        model = validate(config, resumes=agree(lambda: holds_checkpoint(workdir)))
        agree(lambda: check_changes(config, workdir, accept_changes))
        run = make_run(config, model)
        with (
            Checkpoints(workdir, keep=config.train.keep_checkpoints, config=config) as checkpoints,
            MetricLog(log_folder(workdir)) as log,
        ):
            profiler = Profiler(config.train.profile, log_folder(workdir) / "profile")
            training = Training(run, checkpoints, log, interrupt, profiler)
            state = training.begin(workdir)
            write_run_info(workdir, config)
            measured = training.evaluate(training.steps(state))
            trained = reported(measured, checkpoints, run, config, workdir)
        untrained = measure_untrained(run) if config.eval.untrained_baseline else None
        run.evaluator.write(trained, untrained, workdir)
        if jax.process_index() == 0:
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
        interrupt: Interrupt,
        profiler: Profiler,
    ):
        self._run, self._checkpoints = run, checkpoints
        self._log, self._interrupt, self._profiler = log, interrupt, profiler
        self._batches = run.pipeline.iterator(run.plan.total)
        self._step = parallel_train_step(run.step)

    def begin(self, workdir: Path) -> TrainState:
        """The state to start from, with batches and log brought to its step.

        An evaluation that was due there, but did not come to its score, is made up for.
        """
        plan, checkpoints = self._run.plan, self._checkpoints
        state = restore(self._run.template, self._batches, checkpoints)
        if state is None:
            self._log.truncate_after(-1)
            return _on_devices(self._run.initial())
        step = int(state.step)
        due = plan.evaluates_at(step) and not checkpoints.has_score(step)
        last = step >= plan.total  # evaluated in any case
        self._log.truncate_after(step, again="eval/" if due or last else "")
        if jax.process_index() == 0:
            print(f"resuming from step {step} in {workdir}", flush=True)
        state = _on_devices(state)
        if due and not last:
            self.evaluate(state)
        return state

    def steps(self, state: TrainState) -> TrainState:
        """Trains from `state` to the last step."""
        plan, checkpoints, interrupt = self._run.plan, self._checkpoints, self._interrupt
        profiler, start = self._profiler, int(state.step)
        used: set[Future[None]] = set()
        interrupt.idle(self._saved(start))
        with (
            Monitor(
                self._run.pipeline,
                self._run.schedule,
                self._log,
                start=start,
                total=plan.total,
                log_every=plan.log_every,
            ) as monitor,
            self._programs(state, monitor) as programs,
        ):
            for step in range(start + 1, plan.total + 1):
                position = self._batches.get_state()
                batch = monitor.next_batch(self._batches)
                height, width = batch.image.shape[1:3]
                program = programs.program((height, width))
                if used and program not in used:
                    self._wait_for(program, monitor, state, position)
                used.add(program)
                program.result()
                profiler.begin(step)
                state, metrics = self._step(state, split_over_devices(batch))
                if profiler.end(step, metrics):
                    monitor.say(f"profile     {profiler.folder}")
                if step == start + 1:
                    # All processes are past their start then, and will ask together.
                    jax.block_until_ready(metrics)
                interrupt.busy()
                monitor.record(step, metrics)
                stop = interrupt.wanted(step)
                if stop or plan.saves_at(step):
                    # A state is saved only once its loss is known to be finite.
                    monitor.flush()
                    self._log.sync()
                    checkpoints.save(state, self._batches.get_state())
                if stop:
                    interrupt.stop(self._saved(step)())
                if plan.evaluates_at(step) and step < plan.total:
                    self.evaluate(state)
                    interrupt.busy()
                    monitor.restart_clock()
        return state

    def evaluate(self, state: TrainState) -> Measured:
        """Evaluates a state that is saved, and adds its score to the checkpoint.

        On the validation split, where there is one, else on the test split.
        """
        step = int(state.step)
        self._interrupt.idle(self._saved(step))
        measured = self._run.selector.measure(state.params, state.frozen, step)
        self._run.selector.log(measured, self._log)
        self._log.sync()
        self._checkpoints.save(state, self._batches.get_state(), score=score_of(measured.result))
        return measured

    def _programs(self, state: TrainState, monitor: Monitor) -> Programs:
        """The compiled steps for the shapes of all batches that follow `state`."""
        pipeline, types = self._run.pipeline, jax.tree.map(jax.typeof, state)
        start, total = int(state.step), self._run.plan.total

        def build(size: Size) -> None:
            rows = pipeline.batch_size // jax.process_count()
            batch = split_over_devices(empty_batch(rows, size, pipeline.people))
            compile_step(self._step, types, jax.tree.map(jax.typeof, batch))

        return Programs(build, pipeline.shapes(start, total), monitor.compiles)

    def _wait_for(
        self, program: Future[None], monitor: Monitor, state: TrainState, position: Any
    ) -> None:
        """Waits for the program of the next step; a request to stop is heeded at once."""
        if not program.done():
            monitor.flush()
        if self._interrupt.wanted_before(program):
            monitor.flush()
            self._log.sync()
            self._checkpoints.save(state, position)
            self._interrupt.stop(self._saved(int(state.step))())

    def _saved(self, step: int) -> Callable[[], str]:
        """Waits until all that was measured and saved is written, and says so."""

        def finish() -> str:
            self._log.flush()
            self._checkpoints.wait()
            if step == 0:
                return "nothing is lost; the same command starts again"
            return f"step {step} is saved; the same command resumes from it"

        return finish


def _on_devices(state: TrainState) -> TrainState:
    """A copy whose buffers the training step may take."""
    return replicate(jax.tree.map(jnp.copy, state))


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
    if jax.process_index() == 0:
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


def log_folder(workdir: Path) -> Path:
    """Where this process logs: the first one in the workdir, the others in folders of their own."""
    process = jax.process_index()
    return workdir / f"process_{process}" if process else workdir
