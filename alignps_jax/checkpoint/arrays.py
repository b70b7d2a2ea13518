"""The arrays of a checkpoint: how they are written, read, and checked."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignps_jax.arrays import leaves_by_path
from alignps_jax.types import TrainState, UserError

# The largest JSON file; the manifest of the full model takes a thousandth of it.
_MAX_JSON = 64 << 20
_MAX_KEY = 1 << 20  # numbers of the keys of a state
_MANIFEST = ("config", "versions", "arrays")


class _CompleteWrites(ocp.type_handlers.NumpyHandler):
    """Ends all writes before it raises what one of them ran into, such as a full disk.

    Writes that are left over would print into a closed event loop.
    """

    async def _background_serialize(self, values, infos, args=None):
        one = super()._background_serialize
        rows = zip(values, infos, args or [None] * len(values), strict=True)
        writes = [one([value], [info], arg and [arg]) for value, info, arg in rows]
        _raise_first(await asyncio.gather(*writes, return_exceptions=True))


def _raise_first(results: list[Any]) -> None:
    for error in (result for result in results if isinstance(result, BaseException)):
        raise error


def array_writer() -> ocp.PyTreeCheckpointHandler:
    """What Orbax writes the arrays of a checkpoint with."""
    handlers = (np.ndarray, _CompleteWrites())
    registry = ocp.type_handlers.create_type_handler_registry(handlers)
    return _OnDisk(type_handler_registry=registry)


class _OnDisk(ocp.PyTreeCheckpointHandler):
    """Writes a checkpoint's files to the disk itself before the checkpoint gets its name.

    Else the name may outlive a crash of the system that its files do not.
    """

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        for folder, _, names in os.walk(directory.parent):  # all items, written by now
            for name in (*names, ""):
                file = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)


class _HostArrays(ocp.type_handlers.NumpyHandler):
    """Reads nothing that is larger than the manifest says, and ends all reads before it raises.

    Reads that are left over would print into a closed event loop.
    """

    def __init__(self, specs: dict[str, dict[str, Any]]):
        super().__init__()
        self._specs = specs

    async def deserialize(self, infos, args=None):
        reads = [self._read(info, arg) for info, arg in zip(infos, args, strict=True)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        _raise_first(results)
        return results

    async def _read(self, info, arg) -> np.ndarray:
        (about,) = await self.metadata([info])
        spec = self._specs.get(info.name, {})
        found = f"{np.dtype(about.dtype)}{list(about.shape)}"
        if "key" not in spec and found != spec.get("type"):
            raise ValueError(f"{info.name} is {found}, the manifest says {spec.get('type')}")
        if "key" in spec and math.prod(about.shape) > _MAX_KEY:
            raise ValueError(f"{info.name} is {found}, no key of random numbers")
        (array,) = await super().deserialize([info], [arg])
        return array


def snapshot(state: TrainState) -> tuple[dict[str, dict], dict[str, dict[str, np.ndarray]]]:
    """The manifest's entry of every leaf, and by item the arrays to store."""
    leaves = leaves_by_path(state)
    host = jax.device_get(list(leaves.values()))
    specs: dict[str, dict] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {"model": {}, "training": {}}
    for (path, leaf), array in zip(leaves.items(), host, strict=True):
        array = np.asarray(array, order="C")
        specs[path] = {"type": _type(leaf), "crc32": _checksum(array)}
        if array.size:
            arrays[item_of(path)][path] = array
    return specs, arrays


def restore_arrays(folder: Path, template: Any, items: tuple[str, ...]) -> Any:
    """The template's structure with the arrays of these items of a checkpoint."""
    leaves = leaves_by_path(template)
    specs = read_manifest(folder, array_specs)
    found = {path: spec.get("type") for path, spec in specs.items() if item_of(path) in items}
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
        arrays = read_arrays(folder, items, specs)
        return [like(leaf, arrays, path, specs[path]) for path, leaf in leaves.items()]

    return jax.tree.unflatten(jax.tree.structure(template), reading(folder, read))


def read_arrays(
    folder: Path, items: Sequence[str], specs: dict[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """The arrays of these items by path, of the types in `specs`, the manifest's entries.

    Raises ValueError and others where files are damaged.
    """
    handlers = (np.ndarray, _HostArrays(specs))
    registry = ocp.type_handlers.create_type_handler_registry(handlers)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    arrays: dict[str, np.ndarray] = {}
    for item in items:
        arrays |= handler.restore(epath.Path(folder / item))
    return arrays


def like(leaf: Any, arrays: dict[str, np.ndarray], path: str, spec: dict[str, Any]) -> Any:
    """The stored array as what the template has in its place."""
    empty = 0 in np.shape(leaf)
    array = np.zeros(leaf.shape, leaf.dtype) if empty else np.asarray(arrays[path])
    if _checksum(array) != spec["crc32"]:
        raise ValueError(f"wrong checksum of {path}")
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.device_put(array)
    return array if isinstance(leaf, np.ndarray) else type(leaf)(array[()])


def item_of(path: str) -> str:
    """The item of a checkpoint that an array is in."""
    return "model" if path.split("/")[0] in ("step", "params", "frozen") else "training"


def _type(leaf: Any) -> str:
    """Such as float32[3, 3, 256, 256]."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def read_manifest(folder: Path, part: Callable[[dict[str, Any]], Any]) -> Any:
    file = folder / "manifest" / "metadata"
    return reading(folder, lambda: part(unsealed(read_json(file), _MANIFEST)))


def array_specs(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By path, the type and checksum of every array (and the kind, of a random key)."""
    specs = manifest["arrays"]
    for path, spec in specs.items():
        if type(spec["type"]) is not str or type(spec["crc32"]) is not int:
            raise ValueError(f"the manifest's entry of {path[:80]}")
    return specs


def reading(folder: Path, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns; an error of the system or of a damaged file names the folder."""
    try:
        return read()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore document none of what they raise
        if isinstance(error, FileNotFoundError) or not (reason := system_reason(error)):
            raise damaged(folder, error) from error
        raise UserError(f"{folder}: cannot be read ({reason})") from error


def system_reason(error: BaseException | None) -> str | None:
    """What the system said (such as "No space left on device"); None if nothing of it is known.

    TensorStore hides the number of the system's error in the text of its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return os.strerror(int(found[1]))
        error = error.__cause__ or error.__context__
    return None


def damaged(folder: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    reason = reason if reason.isprintable() else ascii(reason)
    return UserError(f"{folder}: damaged checkpoint ({reason})")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content, to be stored as JSON, with its checksum."""
    return {**content, "crc32": _json_checksum(content)}


def unsealed(stored: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Returns what was sealed; ValueError if it changed since, or holds other fields than these.

    Checkpoints of earlier versions have no checksum: then the fields at least have to be right.
    """
    content = {key: value for key, value in stored.items() if key != "crc32"}
    if not content or not set(content) <= set(fields):
        raise ValueError(f"found {', '.join(content)[:80] or 'nothing'}, expected {fields}")
    if "crc32" in stored and stored["crc32"] != _json_checksum(content):
        raise ValueError(f"wrong checksum of {', '.join(content)}")
    return content


def _json_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_json(file: Path) -> Any:
    size = file.stat().st_size
    if size > _MAX_JSON:
        raise ValueError(f"{file.name} has {size} bytes, expected at most {_MAX_JSON}")
    return json.loads(file.read_text("utf-8"))
