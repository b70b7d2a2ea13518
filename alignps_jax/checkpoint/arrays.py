"""The arrays of a checkpoint: how they are written, read, and checked."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.older import NO_LONGER_READ
from alignps_jax.types import TrainState, UserError


class _HostArrays(ocp.type_handlers.NumpyHandler):
    """Ends all reads before it raises; those left over would print into a closed event loop."""

    async def deserialize(self, infos, args=None):
        read = super().deserialize
        reads = [read([info], [arg]) for info, arg in zip(infos, args, strict=True)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        for error in (result for result in results if isinstance(result, BaseException)):
            raise error
        return [array for (array,) in results]


def snapshot(state: TrainState) -> tuple[dict[str, dict], dict[str, dict[str, np.ndarray]]]:
    """The manifest's entry of every leaf, and by item the arrays to store."""
    leaves = leaves_by_path(state)
    host = jax.device_get(list(leaves.values()))
    specs, arrays = {}, {"model": {}, "training": {}}
    for (path, leaf), array in zip(leaves.items(), host, strict=True):
        array = np.asarray(array, order="C")
        specs[path] = {"type": _type(leaf), "crc32": _checksum(array)}
        if array.size:
            arrays[_item(path)][path] = array
    return specs, arrays


def restore_arrays(folder: Path, template: Any, items: tuple[str, ...]) -> Any:
    """The template's structure with the arrays of these items of a checkpoint."""
    leaves = leaves_by_path(template)
    specs = read_manifest(folder, lambda manifest: manifest["arrays"])
    found = {
        path: spec.get("type")
        for path, spec in specs.items()
        if _item(path) in items and path not in NO_LONGER_READ
    }
    expected = {path: _type(leaf) for path, leaf in leaves.items()}
    differences = [
        f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in expected | found
        if found.get(path) != expected.get(path)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"{folder}: does not fit: {'; '.join(differences[:3])}{more}")

    def read() -> list[Any]:
        arrays = read_arrays(folder, items)
        return [like(leaf, arrays, path, specs[path]) for path, leaf in leaves.items()]

    return jax.tree.unflatten(jax.tree.structure(template), reading(folder, read))


def read_arrays(folder: Path, items: tuple[str, ...]) -> dict[str, np.ndarray]:
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _HostArrays()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    arrays = {}
    for item in items:
        arrays |= handler.restore(epath.Path(folder / item))
    return arrays


def like(leaf: Any, arrays: dict[str, np.ndarray], path: str, spec: dict[str, Any]) -> Any:
    """The stored array as what the template has in its place."""
    empty = 0 in np.shape(leaf)
    array = np.zeros(leaf.shape, leaf.dtype) if empty else arrays[path]
    if _checksum(array) != spec["crc32"]:
        raise ValueError(f"wrong checksum of {path}")
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jnp.array(array)
    return array if isinstance(leaf, np.ndarray) else type(leaf)(array[()])


def _item(path: str) -> str:
    return "model" if path.split("/")[0] in ("step", "params", "frozen") else "training"


def _type(leaf: Any) -> str:
    """Such as float32[3, 3, 256, 256]."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8))


def read_manifest(folder: Path, part: Callable[[dict[str, Any]], Any]) -> Any:
    return reading(folder, lambda: part(read_json(folder / "manifest" / "metadata")))


def reading(folder: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever a damaged file makes it raise becomes a UserError."""
    try:
        return read()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{folder}: damaged checkpoint, delete or replace it ({reason})") from error


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())
