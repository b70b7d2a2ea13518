"""The devices of a run: one step on all of them, and compiled programs on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignps_jax.types import Batch, Detections, TrainState

AXIS = "device"

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]
PredictStep = Callable[[Any, Any, Batch], Detections]
Devices = Sequence[jax.Device]


def parallel_train_step(step: Step, devices: Devices | None = None) -> Step:
    """`step` on all devices of all processes, or those given.

    The batch has a leading axis of local devices. The state is replicated, its buffers are reused.
    """
    axes: dict[str, Any] = {"in_axes": (None, 0), "out_axes": (None, None)}
    return jax.pmap(step, axis_name=AXIS, devices=devices, donate_argnums=0, **axes)


def parallel_predict_step(step: PredictStep, devices: Devices | None = None) -> PredictStep:
    """The same for `step` over this process's devices; detections have the leading axis too."""
    used = devices or jax.local_devices()
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), devices=used)


def gather_rows(rows: Any) -> Any:
    """Arrays [N, ...] of all processes, in each of them; N may differ between the processes."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.int32(len(jax.tree.leaves(rows)[0])))
    most = counts.max()
    padded = jax.tree.map(lambda x: np.resize(x, (most, *x.shape[1:])), rows)
    gathered = multihost_utils.process_allgather(padded)
    return jax.tree.map(lambda x: x[np.arange(most) < counts[:, None]], gathered)


def device_names() -> str:
    """Number and kind of the devices of all processes, such as 8 x NVIDIA H100 80GB HBM3."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def peak_memory() -> dict[str, int]:
    """The largest peak of the local devices, in bytes; nothing where it is unknown."""
    known = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stats.get("peak_bytes_in_use", 0) for stats in known)
    return {"peak_memory": peak} if peak else {}


def replicate(tree: Any, devices: Devices | None = None) -> Any:
    """Puts a copy on every local device, or those given."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(batch: Batch, devices: int | None = None) -> Batch:
    """Adds the leading axis: of all local devices, or of this many."""
    count = devices or jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs in `folder`, by default one of the user's, for a quick next start.

    `JAX_COMPILATION_CACHE_DIR` wins if it is set. Where the folder cannot be used, a note says so.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    given, used = Path(named) if named else folder, None
    try:
        found = (given or platformdirs.user_cache_path("alignps_jax")).absolute()
        found.mkdir(mode=0o777 if given else 0o700, parents=True, exist_ok=True)
        about = found.stat()
        if not given and (about.st_uid != os.getuid() or about.st_mode & 0o022):
            raise PermissionError(f"others can write there: '{found}'")  # programs are native code
        tempfile.TemporaryFile(dir=found).close()
        used = str(found)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        print(f"note: compiled programs are not kept ({error})")
    reset_cache()  # JAX opens a folder only once
    jax.config.update("jax_compilation_cache_dir", used)
    # Small ones too: a start compiles hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
