"""When a run saves, evaluates, logs and ends."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from alignps_jax.durations import steps_of


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
    """The plan of a training; a duration below one step counts as one step."""
    total, checkpoint_every, eval_every = (
        max(1, steps_of(config.train[name], steps_per_epoch))
        for name in ("duration", "checkpoint_every", "eval_every")
    )
    return Plan(total, checkpoint_every, eval_every, config.train.log_every_steps)
