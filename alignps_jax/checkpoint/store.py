"""Checkpoints: complete or not there at all, and readable without the run that wrote them.

Orbax writes `<workdir>/checkpoints/<step>/` in the background under a temporary name and renames
it once complete, so a killed run leaves nothing half written behind. A step's folder holds

    model/      step, params and frozen: all that inference needs
    training/   opt_state and memory
    iterator/   state of the data iterator, one file per process
    metrics/    the score, where there is one
    manifest/   config, package versions; dtype, shape and checksum of every array

Arrays are stored as host arrays: nothing ties a checkpoint to the devices that wrote it. Arrays
without elements, which Orbax refuses, are in the manifest only. The checksums are ours because
the format has none over the values: it restores a flipped bit there without complaint.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from alignps_jax.checkpoint.arrays import (
    array_specs,
    array_writer,
    damaged,
    item_of,
    like,
    read_arrays,
    read_json,
    read_manifest,
    reading,
    restore_arrays,
    sealed,
    snapshot,
    system_reason,
    unsealed,
)
from alignps_jax.checkpoint.choice import await_folder, find_step
from alignps_jax.checkpoint.places import steps_in
from alignps_jax.checkpoint.saving import OrbaxLog, wait_until_saved
from alignps_jax.checkpoint.scores import best_step, score_in, write_metrics
from alignps_jax.distributed import broadcast_from_main, is_main_process, is_multiprocess
from alignps_jax.files import write_json
from alignps_jax.types import TrainState, UserError, Weights

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    "opencv-python-headless",
)
# Of a run: its configuration, and what it was run with.
RUN_INFO = ("config.json", "versions.json")
# Of what only reads.
_LOG = OrbaxLog()


class Checkpoints:
    """The checkpoints of one training run: the latest `keep` and the one with the best score.

    A context manager; leaving it waits for the save under way. With several processes each makes
    one, on a shared file system, and calls the same methods: process 0 writes the arrays (equal
    on all), each its own iterator state. Opening removes what unfinished saves left, so only the
    training run may hold one; others read with `load_weights` and `load_config`.

    Raises UserError if the folder cannot be written or a checkpoint's score cannot be read.
    """

    def __init__(self, workdir: Path, *, keep: int, config: ConfigDict):
        if keep < 1:
            raise UserError(f"checkpoints to keep: found {keep}, expected 1 or more")
        self._log = OrbaxLog()
        logging.getLogger("absl").addFilter(self._log)
        self._root = Path(workdir).absolute() / "checkpoints"
        self._about = {"config": json.loads(config.to_json()), "versions": package_versions()}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        # primary_host=None: every process writes, each a file of its own.
        every_process = ocp.options.MultiprocessingOptions(primary_host=None)
        iterator = ocp.JsonCheckpointHandler(
            _iterator_file(), multiprocessing_options=every_process
        )
        registry.add("iterator", ocp.args.JsonSave, iterator)
        for item in ("model", "training"):
            registry.add(item, ocp.args.PyTreeSave, array_writer())
        latest = preservation_policy.LatestN(keep)
        best = preservation_policy.BestN(
            get_metric_fn=score_in, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=score_in,
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            cleanup_tmp_directories=True,
        )
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            best_step(self._root)
            self._manager = ocp.CheckpointManager(
                self._root, options=options, handler_registry=registry
            )
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{self._root}: cannot be written ({error.strerror})") from error
        except Exception as error:  # Orbax reads what it finds there
            raise damaged(self._root, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self._log.error is not None and is_multiprocess():
            return  # others wait for this save; closing would wait for them
        try:
            with self._writing():
                wait_until_saved(self._manager, self._log)
                self._manager.close()
        except UserError:
            if error is None:  # a disk that is full says so again
                raise

    def wait(self) -> None:
        """Returns when no save is under way.
        Raises UserError, with the system's reason, if the last one could not be written.
        """
        with self._writing():
            wait_until_saved(self._manager, self._log)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have many for the same
            reason = system_reason(error)
            if reason is None or isinstance(error, UserError):
                raise
            raise UserError(
                f"{self._root}: cannot be written ({reason}); complete checkpoints stay, and the "
                "same command resumes from the last one"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, as process 0 sees it."""
        self.wait()
        return broadcast_from_main(max(steps_in(self._root), default=None))

    def has_score(self, step: int) -> bool:
        """Whether the checkpoint of a step has its score, as process 0 sees it."""
        self.wait()
        return broadcast_from_main((self._root / str(step) / "metrics").is_dir())

    def save(self, state: TrainState, iterator_state: Any, score: float | None = None) -> None:
        """Copies the state, which may be donated afterwards, and writes it in the background.

        `iterator_state` is bytes or JSON. `score`: higher is better; one that is not finite
        counts as none. If the newest checkpoint is of this very step, it only gets the score.
        Raises UserError for an older step than that, and if this one or the save before it cannot
        be written.
        """
        step = int(state.step)
        metrics = None
        if score is not None and math.isfinite(score):
            metrics = sealed({"score": float(score)})
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise UserError(f"{self._root}: found step {latest}, expected none after {step}")
        if step == latest:
            # The barriers keep other processes from seeing the score early, or not yet.
            ocp.multihost.sync_global_processes("before_score")
            if metrics and is_main_process():
                write_metrics(self._root / str(step), metrics)
            ocp.multihost.sync_global_processes("after_score")
            self._manager.reload()
            return
        specs, arrays = snapshot(state)
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.PyTreeSave(flat) for item, flat in arrays.items()},
                    iterator=ocp.args.JsonSave(sealed(_pack(iterator_state))),
                    manifest=ocp.args.JsonSave(sealed({**self._about, "arrays": specs})),
                ),
                metrics=metrics,
                force=True,
            )

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """State and iterator state of a step, by default the newest.

        `template` (arrays, or `jax.eval_shape`'s) gives structure, shapes and dtypes. Arrays come
        back bit for bit, on the default device; NumPy arrays of the template as NumPy arrays.
        Where another number of processes wrote it, the iterator state is that of their first: all
        have come to the same batch. Raises UserError if there is no such checkpoint, it is
        damaged, or does not fit the template.
        """
        latest = self.latest_step()
        wanted = latest if step is None else step
        if wanted is not None and wanted == latest:
            await_folder(self._root / str(latest))
        folder = find_step(self._root, "latest" if wanted is None else wanted)
        state = restore_arrays(folder, template, ("model", "training"))
        file = folder / "iterator" / _iterator_file()
        found = sorted(path.name for path in file.parent.glob("process_*"))
        if found and file.name not in found:
            file = file.with_name(found[0])
        return state, reading(folder, lambda: _unpack(read_json(file)))


def load_config(path: Path, which: str | int = "chosen") -> ConfigDict:
    """The config of a checkpoint, locked, lists as tuples; otherwise as `load_weights`."""
    return read_manifest(find_step(path, which), lambda manifest: _as_config(manifest["config"]))


def load_run_config(workdir: Path) -> ConfigDict | None:
    """The config that the run in `workdir` was last started with; None without a run.

    Otherwise as `load_config`. Raises UserError if it is damaged.
    """
    file = Path(workdir) / RUN_INFO[0]
    if not file.exists():
        root = Path(workdir) / "checkpoints"
        return load_config(workdir, "latest") if steps_in(root) else None
    try:
        return _as_config(read_json(file))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read, expected a configuration ({error})") from error


def load_weights(
    path: Path,
    template: Weights | TrainState,
    which: str | int = "chosen",
    config: ConfigDict | None = None,
) -> Weights:
    """What inference needs of a checkpoint; nothing else of it is read.

    `path` is a workdir, its `checkpoints` folder, or one step's folder (then `which` does not
    matter). `which` is "chosen" (as `config`, or the run's own, says: `chosen_step`), "latest" or a
    step. `template` as in `Checkpoints.restore`. Raises UserError if there is no such
    checkpoint, it is damaged or does not fit.
    """
    logging.getLogger("absl").addFilter(_LOG)
    weights = Weights(template.step, template.params, template.frozen)
    return restore_arrays(find_step(path, which, config), weights, ("model",))


def load_arrays(
    path: Path, wanted: Callable[[str], bool], which: str | int = "chosen"
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint whose paths (params/neck/lateral3/kernel) are wanted.

    `path`, `which` and errors as in `load_weights`, but nothing has to fit. Arrays without
    elements are left out.
    """
    folder = find_step(path, which)
    specs = read_manifest(folder, array_specs)

    def read() -> dict[str, np.ndarray]:
        items = sorted({item_of(name) for name in specs if wanted(name)})
        arrays = read_arrays(folder, items, specs)
        names = [name for name in specs if name in arrays and wanted(name)]
        return {name: like(arrays[name], arrays, name, specs[name]) for name in names}

    return reading(folder, read)


def package_versions() -> dict[str, str]:
    """Python, the packages that decide results, and the kind of device."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = {package: installed.get(package, "not installed") for package in _PACKAGES}
    device = jax.devices()[0].device_kind
    return {"python": platform.python_version(), **versions, "device": device}


def write_run_info(workdir: Path, config: ConfigDict) -> None:
    """Writes the files of `RUN_INFO` for people to read (process 0 only)."""
    if is_main_process():
        # A field may be infinite, such as a gradient norm that is not clipped.
        content = json.loads(config.to_json())
        config_file, versions_file = (Path(workdir) / name for name in RUN_INFO)
        write_json(config_file, content, allow_nan=True)
        write_json(versions_file, package_versions())


def _as_config(stored: dict[str, Any]) -> ConfigDict:
    return ConfigDict(_tuples(stored)).lock()


def _iterator_file() -> str:
    return f"process_{jax.process_index()}-of-{jax.process_count()}"


def _pack(iterator_state: Any) -> dict[str, Any]:
    if isinstance(iterator_state, bytes):
        return {"bytes": iterator_state.decode("latin-1")}
    return {"json": json.loads(json.dumps(iterator_state))}  # a copy, as it is written later


def _unpack(packed: dict[str, Any]) -> Any:
    packed = unsealed(packed, ("bytes", "json"))
    return packed["bytes"].encode("latin-1") if "bytes" in packed else packed["json"]


def _tuples(value: Any) -> Any:
    """JSON has lists only, the config tuples only."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
