"""What the training loop says, and when it reads what the devices compute."""

import numpy as np

from alignps_jax.log import MetricLog, read_log
from alignps_jax.training.monitor import FIRST_STEP, Monitor
from alignps_jax.training.step import StepMetrics
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


def test_a_step_is_read_when_the_next_one_is_under_way(tmp_path, capsys):
    pipeline = train(make_split(mixed_sizes(11, 6)))
    batches = pipeline.iterator(4)
    events = []
    with (
        MetricLog(tmp_path) as log,
        Monitor(pipeline, lambda step: 0.1, log, start=0, total=4, log_every=2) as monitor,
    ):
        monitor.compiles((96, 160), 1)
        for step in range(1, 5):
            monitor.next_batch(batches)
            events.append(f"dispatch {step}")
            monitor.record(step, metrics(step, events))
        monitor.flush()
    seen = list(dict.fromkeys(events))
    assert seen == [
        "dispatch 1",
        "dispatch 2",
        "read 1",
        "dispatch 3",
        "read 2",
        "dispatch 4",
        "read 3",
        "read 4",
    ]
    lines = read_log(tmp_path / "log.jsonl")
    assert [line.step for line in lines] == [2, 4]
    assert all(0 <= line.values["data_wait"] <= 1 for line in lines)

    said = capsys.readouterr().out.splitlines()
    programs = f"(1 of at most {len(pipeline.buckets)} programs)"
    assert f"compiling the training step for 96x160 images {programs}" in said
    assert [line.startswith(FIRST_STEP) for line in said].count(True) == 1
