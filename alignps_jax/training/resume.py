"""What a run resumes from, and whether it is still the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grain
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import Checkpoints, load_config
from alignps_jax.types import TrainState, UserError

# Fields that change no training step: where things lie, how fast they are read, what is measured
# and written when, and how long it goes on. `pretrained` mattered before the first step.
FREE = (
    *("data.root", "data.prepared_dir", "data.max_pixels", "data.workers", "data.prefetch"),
    *("data.test_scale", "model.pretrained", "model.remat"),
    *("train.duration", "train.log_every_steps", "train.checkpoint_every", "train.eval_every"),
    *("train.keep_checkpoints", "train.accumulate", "train.profile"),
)
FREE_SECTIONS = ("eval",)
# Says which people a checkpoint's score is of, so that another value makes scores incomparable.
FIXED = ("data.validation_fraction",)


def check_changes(config: ConfigDict, workdir: Path, accepted: bool) -> None:
    """Holds `config` against that of the newest checkpoint in `workdir`, if there is one.

    Prints the changes that training cannot feel, and the others where they are `accepted`.

    Raises:
      UserError: a field changed that decides what training does, or, accepted or not, one that
        decides what scores mean; all such fields are named.
    """
    if not holds_checkpoint(workdir):
        return
    before, now = _flat(load_config(workdir, "latest")), _flat(config)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    fixed = [name for name in changed if name in FIXED]
    if fixed:
        raise UserError(
            f"{workdir}: its checkpoints were scored on other people: "
            f"{_differences(fixed, before, now)}; resume with the old value, or choose another "
            "--workdir"
        )
    felt = [name for name in changed if not _is_free(name)]
    if felt and not accepted:
        raise UserError(
            f"{workdir}: its last checkpoint was trained otherwise: "
            f"{_differences(felt, before, now)}; resume with the old values, train on with the "
            "new ones (--accept_changes), or choose another --workdir"
        )
    for name in changed:
        print(f"note: config.{name} is now {now.get(name)!r}, before {before.get(name)!r}")


def _differences(names: Iterable[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(
        f"config.{name}: found {now.get(name)!r}, expected {before.get(name)!r}" for name in names
    )


def restore(
    template: Callable[[], TrainState], batches: grain.DatasetIterator, checkpoints: Checkpoints
) -> TrainState | None:
    """The state of the newest complete checkpoint, with the batches brought to the same step.

    None where there is no checkpoint. What `template` gives may be abstract.
    """
    if checkpoints.latest_step() is None:
        return None
    state, iterator_state = checkpoints.restore(template())
    if iterator_state is not None:  # converted weights have seen no data
        batches.set_state(iterator_state)
    return state


def _flat(config: ConfigDict) -> dict[str, Any]:
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def _is_free(name: str) -> bool:
    return name in FREE or name.split(".")[0] in FREE_SECTIONS
