"""What a run resumes from, and whether it is still the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grain
import jax
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import holds_checkpoint, last_step
from alignps_jax.checkpoint.store import Checkpoints, load_config
from alignps_jax.config import FIELD_KINDS, NETWORK, TRAINING, flat_fields
from alignps_jax.distributed import is_main_process
from alignps_jax.types import TrainState, UserError


def check_changes(config: ConfigDict, workdir: Path, accepted: bool) -> None:
    """Prints how `config` differs from that of the newest checkpoint in `workdir`.

    Raises UserError for a change that training feels, unless it was `accepted`.
    """
    if not holds_checkpoint(workdir):
        return
    before, now = (flat_fields(x) for x in (load_config(last_step(workdir)), config))
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    decisive = [n for n in changed if FIELD_KINDS.get(n, TRAINING) in (NETWORK, TRAINING)]
    if decisive and not accepted:
        fields = "; ".join(
            f"config.{n}: found {now.get(n)!r}, expected {before.get(n)!r}" for n in decisive
        )
        raise UserError(
            f"{workdir}: its last checkpoint was trained otherwise: {fields}; resume with the old "
            "values, train on with the new ones (--accept_changes), or choose another --workdir"
        )
    for name in changed:
        print(f"note: config.{name} is now {now.get(name)!r}, before {before.get(name)!r}")


def restore(
    create: Callable[[], TrainState], batches: grain.DatasetIterator, checkpoints: Checkpoints
) -> TrainState | None:
    """The newest state, like that of `create`, with the batches brought to its step, if any."""
    if checkpoints.latest_step() is None:
        return None
    state, iterator_state = checkpoints.restore(jax.eval_shape(create))
    if iterator_state is not None:  # converted weights have seen no data
        batches.set_state(iterator_state)
    if is_main_process():
        print(f"resuming from step {int(state.step)}", flush=True)
    return state
