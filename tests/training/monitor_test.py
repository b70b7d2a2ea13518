"""What the training loop says, and when it reads what the devices compute."""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.log import MetricLog, read_log
from alignps_jax.training.monitor import Monitor
from alignps_jax.training.setup import Plan, Run
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


def metrics(loss, others=1.0) -> StepMetrics:
    return StepMetrics({"cls": loss}, *[np.float32(others)] * 3)


@contextlib.contextmanager
def monitored(folder, *, total, log_every, start=0, profile=None):
    """A monitor, the batches of its pipeline, and the images of a batch."""
    pipeline, plan = train(make_split(mixed_sizes(11, 6))), Plan(total, 99, 99, log_every, profile)
    run = Run(pipeline, plan, lambda step: 0.1 * step, *[None] * 4)
    with MetricLog(folder) as log, contextlib.closing(Monitor(run, log, start)) as monitor:
        yield monitor, pipeline.iterator(total), pipeline


def test_steps_are_read_where_they_are_logged(tmp_path, capsys):
    events = []
    with monitored(tmp_path, total=4, log_every=2) as (monitor, batches, pipeline):
        for step in range(1, 5):
            monitor.next_batch(batches, step)
            events.append(f"dispatch {step}")
            monitor.record(step, metrics(Measured(1.0, step, events)))
    # The first step, since a line says when it was done; the others where they are logged.
    assert list(dict.fromkeys(events)) == [
        *("dispatch 1", "read 1", "dispatch 2", "read 2"),
        *("dispatch 3", "dispatch 4", "read 3", "read 4"),
    ]
    lines = read_log(tmp_path / "log.jsonl")
    assert [step for step, _ in lines] == [2, 4]
    assert all(0 <= values["data_wait"] <= 1 for _, values in lines)
    assert [round(values["learning_rate"], 6) for _, values in lines] == [0.1, 0.3]
    assert all(values["loss"] == values["loss/cls"] == 1 for _, values in lines)

    said = capsys.readouterr().out.splitlines()
    compiled = [line for line in said if line.startswith("compiling the training step for ")]
    assert len(compiled) == len(set(compiled)) >= 1
    assert compiled[0].endswith(f"images (1 of at most {len(pipeline.buckets)} shapes)")
    assert [line.startswith("first step done") for line in said].count(True) == 1


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    with monitored(tmp_path, total=9, log_every=5) as (monitor, *_):
        for step in range(1, 5):
            monitor.record(step, metrics(np.inf if step == 3 else 1.0))
        with pytest.raises(UserError, match=r"step 3: loss/cls not finite, on the images"):
            monitor.flush()  # before a state is saved


@pytest.mark.parametrize("pause", [0, 3])
def test_the_rate_is_that_of_results_not_of_dispatches(tmp_path, pause):
    """A device that computes 50 ms long, and an evaluation that takes a while."""

    def compute(x):
        time.sleep(0.05)
        return np.float32(x + 1)

    @jax.jit
    def step_fn(x):
        return jax.pure_callback(compute, jax.ShapeDtypeStruct((), jnp.float32), x)

    state = step_fn(jnp.float32(0))
    with monitored(tmp_path, total=6, log_every=2) as (monitor, batches, pipeline):
        for step in range(1, 7):
            monitor.next_batch(batches, step)
            state = step_fn(state)
            monitor.record(step, metrics(state))
            if step == pause:
                monitor.flush()
                time.sleep(0.5)
                monitor.restart_clock()
    rates = [values["images_per_second"] for _, values in read_log(tmp_path / "log.jsonl")]
    true = pipeline.batch_size / 0.05
    assert all(0.4 * true < rate < 1.6 * true for rate in rates[1:]), rates


@pytest.mark.parametrize("start", [0, 2])  # a resumed run may begin in the middle
def test_the_steps_asked_for_are_traced(tmp_path, start, capsys):
    about = {"total": 5, "log_every": 9, "start": start, "profile": "2:4"}
    with monitored(tmp_path, **about) as (monitor, batches, _):
        for step in range(start + 1, 6):
            monitor.next_batch(batches, step)
            monitor.record(step, metrics(jnp.ones(())))
        assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert capsys.readouterr().out.count(f"profile     {tmp_path / 'profile'}") == 1
