"""The devices of a run: one step on all of them, and compiled programs on disk."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, monitoring
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignps_jax import peers
from alignps_jax.registry import choose
from alignps_jax.seals import Seals
from alignps_jax.types import AnyArray, Batch, Detections, TrainState, UserError

AXIS = "device"
# What JAX has measured when it has compiled a program, and written it.
_COMPILED = "/jax/core/compile/backend_compile_duration"

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]
Devices = Sequence[jax.Device]


def parallel_train_step(step: Step, how: str = "pmap", devices: Devices | None = None) -> Step:
    """`step` over all devices of all processes; the batch has a leading axis of local devices.

    The state goes in and out as ordinary replicated arrays (`replicate` makes them so first) and
    its buffers are reused. All ways give the same result to the last bit.

    Args:
      step: what one device does with its share of the batch.
      how: `config.train.parallel`, an entry of `PARALLEL`.
      devices: the devices to use, or to compile for, instead of all.

    Raises:
      UserError: there is no such way.
    """
    return choose("config.train.parallel", how, PARALLEL)(step, devices)


def _with_pmap(step: Step, devices: Devices | None) -> Step:
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )


def _with_shard_map(step: Step, devices: Devices | None) -> Step:
    """The same step under `jit` and a mesh."""
    mesh = _mesh(devices)
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)

    def on_one_device(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        return step(state, jax.tree.map(partial(jnp.squeeze, axis=0), batch))

    # Unchecked, because the step itself says what is summed over the devices.
    mapped = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(everywhere, split),
        out_specs=everywhere,
        check_vma=False,
    )
    whole, parts = (NamedSharding(mesh, spec) for spec in (everywhere, split))
    program: Any = jax.jit(
        mapped, in_shardings=(whole, parts), out_shardings=whole, donate_argnums=0
    )
    if jax.process_count() == 1:
        return program

    def on_all_processes(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        specs = everywhere, split
        arguments = multihost_utils.host_local_array_to_global_array((state, batch), mesh, specs)
        out = program(*arguments)
        return multihost_utils.global_array_to_host_local_array(out, mesh, everywhere)

    on_all_processes.lower = program.lower  # type: ignore[attr-defined]  # as of jit and pmap
    return on_all_processes


def _mesh(devices: Devices | None = None) -> Mesh:
    """These devices, or all: those of a process side by side, which is the order of pmap."""
    found = devices or sorted(jax.devices(), key=lambda device: device.process_index)
    return Mesh(np.array(found), (AXIS,))


def compile_step(step: Any, state: Any, batch: Any) -> None:
    """Compiles a parallel training step, so that its call with such arguments compiles nothing.

    It may run in a thread beside calls of the step.

    Args:
      step: what `parallel_train_step` gives, for all devices.
      state: types (`jax.typeof`) of a state as `replicate` gives it.
      batch: types of a batch with the leading axis of local devices.
    """
    if (count := jax.process_count()) > 1:
        # The program is that of the arrays of all processes.
        whole, parts = (NamedSharding(_mesh(), PartitionSpec(*axes)) for axes in ((), (AXIS,)))
        state = jax.tree.map(lambda x: _type(x, x.shape, whole), state)
        batch = jax.tree.map(lambda x: _type(x, (count * x.shape[0], *x.shape[1:]), parts), batch)
    step.lower(state, batch).compile()


def _type(x: Any, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
    return jax.typeof(
        jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
    )


# How a step comes to run on all devices (`config.train.parallel`).
PARALLEL: dict[str, Callable[[Step, Devices | None], Step]] = {
    "pmap": _with_pmap,
    "shard_map": _with_shard_map,
}


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
    """Adds the leading axis: of all local devices, or of so many."""
    devices = devices or jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def use_compilation_cache(folder: Path, alone: bool = False) -> None:
    """Keeps compiled programs in `folder`, so that the next start is quick.

    The small ones too: a start compiles hundreds of them, initializers above all. Programs are
    native code: whoever can write there decides what runs. Training keeps them in its own workdir;
    everything that reads other people's folders takes `own_cache`. Damaged ones are removed first.

    Args:
      folder: where, made if it is missing.
      alone: nobody else writes there now, but other processes of this run.
    """
    folder = Path(folder).absolute()
    if peers.leads():  # the one process that writes there
        seals = Seals(folder)
        seals.drop_damaged(alone)
        monitoring.register_event_duration_secs_listener(partial(_seal, seals))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _seal(seals: Seals, event: str, seconds: float, **about: str | int) -> None:
    """Called by JAX after all that it measures."""
    if event == _COMPILED:
        seals.add_new()


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
