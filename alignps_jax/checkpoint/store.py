"""Checkpoints: complete or not there at all, and readable without the run that wrote them.

Orbax writes `<workdir>/checkpoints/<step>/` in the background under a temporary name and renames
it once complete, so a killed run leaves nothing half written behind. A step's folder holds

    arrays/     step, params, frozen, opt_state and memory
    metrics/    the score, where there is one
    manifest/   config, package versions, state of the data iterator; type and checksum of arrays
    calibration.json   once it was evaluated (`evaluation.calibration`)

Arrays are host arrays: nothing ties a checkpoint to the devices that wrote it. Those without
elements, which Orbax refuses, are in the manifest only. The checksums are ours because the format
has none over the values: it restores a flipped bit there without complaint.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import operator
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from alignps_jax.checkpoint.arrays import (
    ARRAYS,
    ArrayWriter,
    read_arrays,
    read_manifest,
    reading,
    restore_arrays,
    snapshot,
    system_error,
)
from alignps_jax.checkpoint.places import CHECKPOINTS, SCORE, chosen_step, last_step, steps_in
from alignps_jax.distributed import broadcast_from_main, is_main_process
from alignps_jax.files import read_json, write_json
from alignps_jax.types import TrainState, UserError, Weights

_SCORE = operator.itemgetter("score")
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    "opencv-python-headless",
)
# In a workdir, the configuration that the run was last started with.
RUN_CONFIG = "config.json"


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one training run: the latest `keep` and the one with the best score.

    A context manager; leaving it waits for the save under way. With several processes each makes
    one, on a shared file system, and calls the same methods: process 0 alone writes, as states and
    positions in the data are equal on all. Opening removes what unfinished saves left, so only the
    training run may hold one; others read with `load_weights` and `load_config`.
    """

    def __init__(self, workdir: Path, *, keep: int, config: ConfigDict):
        logging.set_verbosity(logging.FATAL)  # Orbax logs what it also raises
        self._root = Path(workdir).absolute() / CHECKPOINTS
        self._about = {"config": json.loads(config.to_json()), "versions": package_versions()}
        self._manager = None
        if is_main_process():
            self._root.mkdir(parents=True, exist_ok=True)
            with reading(self._root):
                self._manager = _manager(self._root, keep)

    def __exit__(self, *_: object) -> None:
        if self._manager:
            with self._writing():
                self._manager.close()

    def wait(self) -> None:
        """Process 0 returns when no save is under way.

        Raises UserError, with the system's reason, if the last one could not be written.
        """
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have many for the same
            if not (said := system_error(error)):
                raise
            raise UserError(
                f"{self._root}: cannot be written ({said.strerror}); complete checkpoints stay, "
                "and the same command resumes from the last one"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, as process 0 sees it."""
        self.wait()
        return broadcast_from_main(max(steps_in(self._root), default=None))

    def has_score(self, step: int) -> bool:
        """Whether the checkpoint of a step has its score, as process 0 sees it."""
        self.wait()
        return broadcast_from_main((self._root / str(step) / SCORE).is_file())

    def save(self, state: TrainState, iterator_state: Any, score: float | None = None) -> None:
        """Copies the state, which may be donated afterwards, and writes it in the background.

        `iterator_state` is JSON. `score`: higher is better; non-finite scores are ignored. If the
        newest checkpoint is of this very step, it only gets the score.
        Raises UserError if this checkpoint or the one before it cannot be written.
        """
        step = int(state.step)
        metrics = {"score": float(score)} if score is not None and math.isfinite(score) else None
        exists = step == self.latest_step()
        if self._manager and exists and metrics:
            _write_score(self._root / str(step), metrics)
            self._manager.reload()
        if exists or not self._manager:
            return
        specs, arrays = snapshot(state)
        iterator_state = json.loads(json.dumps(iterator_state))  # a copy, as it is written later
        manifest = {**self._about, "iterator": iterator_state, "arrays": specs}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest)
                ),
                metrics=metrics,
                force=True,
            )

    def restore(self, template: TrainState) -> tuple[TrainState, Any]:
        """State and iterator state of the newest step.

        `template` (arrays, or `jax.eval_shape`'s) gives structure, shapes and dtypes. Arrays come
        back bit for bit, on the default device. Raises UserError if the checkpoint is damaged or
        does not fit the template.
        """
        folder = self._root / str(self.latest_step())
        return restore_arrays(folder, template), read_manifest(folder)["iterator"]


def load_config(path: Path) -> ConfigDict:
    """The config of a checkpoint, locked, lists as tuples; otherwise as `load_weights`."""
    return _as_config(read_manifest(chosen_step(path)[0])["config"])


def load_run_config(workdir: Path) -> ConfigDict | None:
    """The config that the run in `workdir` was last started with; None without a run.

    Otherwise as `load_config`. Raises UserError if it is damaged.
    """
    file = Path(workdir) / RUN_CONFIG
    if file.exists():
        return _as_config(read_json(file, "the configuration of a run"))
    if steps_in(Path(workdir) / CHECKPOINTS):
        return load_config(last_step(workdir))
    return None


def load_weights(
    path: Path, template: Weights | TrainState, config: ConfigDict | None = None
) -> Weights:
    """What inference needs of a checkpoint; nothing else of it is read.

    `path` and `config` as in `chosen_step`, `template` as in `Checkpoints.restore`. Raises
    UserError if there is no such checkpoint, it is damaged or does not fit.
    """
    weights = Weights(template.step, template.params, template.frozen)
    return restore_arrays(chosen_step(path, config)[0], weights)


def load_arrays(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint whose paths (params/neck/lateral3/kernel) are wanted.

    Otherwise as `load_weights`. Arrays without elements are left out.
    """
    folder = chosen_step(path)[0]
    specs = read_manifest(folder)["arrays"]
    return read_arrays(folder, {name: spec for name, spec in specs.items() if wanted(name)})


def package_versions() -> dict[str, str]:
    """Python, the packages that decide results, and the kind of device."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = {package: installed.get(package, "not installed") for package in _PACKAGES}
    device = jax.devices()[0].device_kind
    return {"python": platform.python_version(), **versions, "device": device}


def write_run_info(workdir: Path, config: ConfigDict) -> None:
    """Writes what `load_run_config` reads (process 0 only)."""
    if is_main_process():
        # A field may be infinite, such as a gradient norm that is not clipped.
        write_json(Path(workdir) / RUN_CONFIG, json.loads(config.to_json()), allow_nan=True)


def _manager(root: Path, keep: int) -> ocp.CheckpointManager:
    """Orbax's manager of process 0 alone: one that fails waits for no other process."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(ARRAYS, ocp.args.PyTreeSave, ArrayWriter())
    best = policy.BestN(get_metric_fn=_SCORE, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=_SCORE,
        preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(keep), best]),
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
    )
    return ocp.CheckpointManager(root, options=options, handler_registry=registry)


def _write_score(folder: Path, metrics: dict[str, float]) -> None:
    if (folder / SCORE).is_file():
        return write_json(folder / SCORE, metrics)
    write_json(folder / "new" / SCORE.name, metrics)
    (folder / "new").rename(folder / SCORE.parent)  # Orbax fails on a folder without the file


def _as_config(stored: Any) -> Any:
    """The config of JSON, locked; JSON has lists only, the config tuples only."""
    if isinstance(stored, dict):
        return ConfigDict({name: _as_config(value) for name, value in stored.items()}).lock()
    return tuple(map(_as_config, stored)) if isinstance(stored, list) else stored
