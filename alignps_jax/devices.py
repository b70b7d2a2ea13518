"""The devices of a run: one step on all of them, and compiled programs on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignps_jax.types import Batch, Detections, TrainState, UserError

AXIS = "device"


def parallel_train_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """`step` over all devices of all processes; the batch has a leading axis of local devices.

    The state goes in and out as ordinary replicated arrays (`replicate` makes them so first) and
    its buffers are reused.
    """
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0
    )


def parallel_predict_step(
    step: Callable[[Any, Any, Batch], Detections],
) -> Callable[[Any, Any, Batch], Detections]:
    """`step` over this process's devices; batch and detections have a leading device axis."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), devices=jax.local_devices())


def replicate(tree: Any) -> Any:
    """Puts a copy on every local device, which is what buffer donation under pmap asks for."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(batch: Batch) -> Batch:
    """Adds the leading axis of local devices."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs in `folder`, so that the next start is quick.

    The small ones too: a start compiles hundreds of them, initializers above all. Programs are
    native code: whoever can write there decides what runs. Training keeps them in its own workdir;
    everything that reads other people's folders takes `own_cache`.
    """
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def own_cache() -> Path:
    """The folder of this user's compiled programs, made if it is missing; nobody else can write it.

    It is `$XDG_CACHE_HOME/alignps_jax/xla`, by default below `~/.cache`.

    Raises:
      UserError: the folder cannot be made, is somebody else's, or others can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    folder = root / "alignps_jax" / "xla"
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = path.stat()
            if about.st_uid != os.getuid():
                raise UserError(
                    f"{path}: found a folder of user {about.st_uid}, expected your own "
                    f"(user {os.getuid()}) for compiled programs; set XDG_CACHE_HOME"
                )
            if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise UserError(
                    f"{path}: found a folder that others can write to, expected one for compiled "
                    f"programs that only you can (chmod 700 {path})"
                )
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: no folder for compiled programs can be made there "
            f"({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    return folder
