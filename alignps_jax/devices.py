"""The devices of a run: one step on all of them, and compiled programs on disk."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import platformdirs
from jax import lax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignps_jax.types import AnyArray, Batch, Detections, TrainState

AXIS = "device"
_NAME = "alignps_jax"  # of the folder in the user's cache

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]
Devices = Sequence[jax.Device]


def parallel_train_step(step: Step, devices: Devices | None = None) -> Step:
    """`step` over all devices of all processes, or those given, by `pmap`.

    The batch has a leading axis of local devices. The state goes in and out as ordinary replicated
    arrays (`replicate` makes them so first) and its buffers are reused.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )


def parallel_predict_step(
    step: Callable[[Any, Any, Batch], Detections], devices: Devices | None = None
) -> Callable[[Any, Any, Batch], Detections]:
    """`step` over this process's devices, or those given.

    Batch and detections have a leading device axis.
    """
    used = devices or jax.local_devices()
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), devices=used)


def sum_over_devices(devices: Devices) -> Callable[[Any], Any]:
    """Adds up arrays with a leading axis of these devices; the sum is on all of them."""
    return jax.pmap(partial(lax.psum, axis_name=AXIS), axis_name=AXIS, devices=devices)


def gather_rows(rows: Any) -> Any:
    """The rows of all processes, those of process 0 first, in each of them.

    Args:
      rows: arrays [N, ...] of one N, which may differ from process to process.
    """
    if jax.process_count() == 1:
        return rows
    count = len(jax.tree.leaves(rows)[0])
    counts = multihost_utils.process_allgather(np.int32(count))

    def padded(array: AnyArray) -> np.ndarray:
        return np.pad(array, [(0, int(counts.max()) - count)] + [(0, 0)] * (array.ndim - 1))

    gathered = multihost_utils.process_allgather(jax.tree.map(padded, rows))
    return jax.tree.map(
        lambda parts: np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)]),
        gathered,
    )


def device_names() -> str:
    """Number and kind of the devices of all processes, such as 8 x NVIDIA H100 80GB HBM3."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def peak_memory() -> dict[str, int]:
    """The most that a local device has held at a time, in bytes; nothing where that is unknown."""
    known = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in known if "peak_bytes_in_use" in stats]
    return {"peak_memory": max(peaks)} if peaks else {}


def replicate(tree: Any, devices: Devices | None = None) -> Any:
    """Puts a copy on every local device, or those given, which is what buffer donation asks for."""
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(batch: Batch, devices: int | None = None) -> Batch:
    """Adds the leading axis: of all local devices, or of this many."""
    devices = devices or jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keeps compiled programs in `folder`, by default one of the user's, for a quick next start.

    `JAX_COMPILATION_CACHE_DIR` wins if it is set. Where the folder cannot be used, a note says so.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    used: Path | None = Path(named) if named else folder
    try:
        used = _usable(used or platformdirs.user_cache_path(_NAME), private=used is None)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        print(f"note: compiled programs are not kept ({error})")
        used = None
    reset_cache()  # JAX opens a folder only once
    jax.config.update("jax_compilation_cache_dir", str(used) if used else None)
    # Small ones too: a start compiles hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _usable(folder: Path, private: bool) -> Path:
    """Makes the folder; OSError if it cannot be written, or is `private` and others can write."""
    folder = folder.absolute()
    folder.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    about = folder.stat()
    foreign = about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if private and foreign:  # programs are native code
        raise PermissionError(errno.EPERM, "others can write there", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "not writable", str(folder))
    return folder
