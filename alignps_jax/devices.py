"""The devices of a run: one step on all of them, and compiled programs on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignps_jax.types import Batch, Detections, TrainState

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


def use_compilation_cache(workdir: Path, checkpoint: Path | None = None) -> None:
    """Keeps compiled programs in `<workdir>/xla_cache`, so that the next start is quick.

    The small ones too: a start compiles hundreds of them, initializers above all. Where a whole
    run is the `checkpoint` that is used, its own cache serves all that is done with it.
    """
    if checkpoint is not None and (checkpoint / "checkpoints").is_dir():
        workdir = checkpoint
    jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "xla_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
