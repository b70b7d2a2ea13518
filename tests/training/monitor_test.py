"""What the training loop says, and when it reads what the devices compute."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax import log as log_module
from alignps_jax.log import MetricLog, read_log
from alignps_jax.training.monitor import FIRST_STEP, Monitor
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import UserError
from tests.data_pipeline.pipeline_test import make_split, mixed_sizes, train


class Measured(float):
    """A number that notes when it is fetched from its device."""

    def __new__(cls, value, name, events):
        number = super().__new__(cls, value)
        number.name, number.events = name, events
        return number

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"read {self.name}")
        return np.array(float(self), dtype)


def metrics(step, events):
    one = np.ones(())
    return StepMetrics(
        terms={"cls": Measured(1.0, step, events)},
        positives=one,
        dropped_positives=one,
        grad_norm=one,
        update_norm=one,
        param_norm=one,
    )


def test_steps_are_read_where_they_are_logged(tmp_path, capsys):
    pipeline = train(make_split(mixed_sizes(11, 6)))
    batches = pipeline.iterator(4)
    events = []
    with (
        MetricLog(tmp_path) as log,
        Monitor(pipeline, lambda step: 0.1 * step, log, start=0, total=4, log_every=2) as monitor,
    ):
        for step in range(1, 5):
            monitor.next_batch(batches, step)
            events.append(f"dispatch {step}")
            monitor.record(step, metrics(step, events))
        monitor.flush()
    # The first step, since a line says when it was done; the others where they are logged.
    assert list(dict.fromkeys(events)) == [
        *("dispatch 1", "read 1", "dispatch 2", "read 2"),
        *("dispatch 3", "dispatch 4", "read 3", "read 4"),
    ]
    lines = read_log(tmp_path / "log.jsonl")
    assert [line.step for line in lines] == [2, 4]
    assert all(0 <= line.values["data_wait"] <= 1 for line in lines)
    assert [round(line.values["learning_rate"], 6) for line in lines] == [0.1, 0.3]

    said = capsys.readouterr().out.splitlines()
    compiled = [line for line in said if line.startswith("compiling the training step for ")]
    assert len(compiled) == len(set(compiled)) >= 1
    assert compiled[0].endswith(f"images (1 of at most {len(pipeline.buckets)} shapes)")
    assert [line.startswith(FIRST_STEP) for line in said].count(True) == 1


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    pipeline = train(make_split(mixed_sizes(11, 6)))
    one, rate = jnp.ones(()), lambda step: 0.1
    with (
        MetricLog(tmp_path) as log,
        Monitor(pipeline, rate, log, start=0, total=9, log_every=5) as monitor,
    ):
        for step in range(1, 5):
            loss = {"cls": one if step != 3 else jnp.inf * one}
            monitor.record(step, StepMetrics(loss, one, one, one, one, one))
        with pytest.raises(UserError, match=r"step 3: loss/cls not finite, on the images"):
            monitor.flush()  # before a state is saved


@pytest.mark.parametrize("saves_at", [0, 3])
def test_the_rate_is_that_of_results_not_of_dispatches(tmp_path, saves_at):
    """A device that computes 50 ms long, and dispatches that wait for it or do not."""
    pipeline = train(make_split(mixed_sizes(11, 6)))
    batches = pipeline.iterator(6)

    def compute(x):
        time.sleep(0.05)
        return np.float32(x + 1)

    @jax.jit
    def step_fn(x):
        return jax.pure_callback(compute, jax.ShapeDtypeStruct((), jnp.float32), x)

    state = step_fn(jnp.float32(0))
    with (
        MetricLog(tmp_path) as log,
        Monitor(pipeline, lambda step: 0.1, log, start=0, total=6, log_every=1) as monitor,
    ):
        for step in range(1, 7):
            monitor.next_batch(batches, step)
            state = step_fn(state)
            monitor.record(step, StepMetrics({"cls": state}, state, state, state, state, state))
            if step == saves_at:
                monitor.flush()
        monitor.flush()
    rates = [line.values["images_per_second"] for line in read_log(tmp_path / "log.jsonl")][1:]
    true = pipeline.batch_size / 0.05
    assert all(0.4 * true < rate < 1.6 * true for rate in rates), rates


@pytest.mark.parametrize("start", [0, 2])  # a resumed run may begin in the middle
def test_the_steps_asked_for_are_traced(tmp_path, start, capsys):
    pipeline, number = train(make_split(mixed_sizes(11, 6))), jnp.ones(())
    batches, folder = pipeline.iterator(5), tmp_path / "profile"
    with (
        MetricLog(tmp_path) as log,
        Monitor(
            pipeline,
            lambda step: 0.1,
            log,
            start=start,
            total=5,
            log_every=9,
            profile="2:4",
            folder=folder,
        ) as monitor,
    ):
        for step in range(start + 1, 6):
            monitor.next_batch(batches, step)
            values = StepMetrics({"cls": number}, number, number, number, number, number)
            monitor.record(step, values)
        assert list(folder.rglob("*.xplane.pb"))
    assert capsys.readouterr().out.count(f"profile     {folder}") == 1


def test_progress_in_a_log_file_is_a_line_now_and_then(capsys, monkeypatch):
    for _ in log_module.progress(range(3), desc="quick", unit="step"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(log_module, "_SECONDS_PER_LINE", 0.01)
    for _ in log_module.progress(range(3), desc="slow", unit="step"):
        time.sleep(0.03)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 4
    assert lines[-1].startswith("slow: 3 of 3 [")
