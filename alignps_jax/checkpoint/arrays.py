"""The arrays of a checkpoint: how they are written, read, and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignps_jax.arrays import leaves_by_path
from alignps_jax.types import TrainState, UserError

ARRAYS = "arrays"  # the folder
# By path, an array's type, such as float32[3, 3, 256, 256], and the crc32 of its values.
Specs = Mapping[str, dict[str, Any]]


class ArrayWriter(ocp.PyTreeCheckpointHandler):
    """Has a checkpoint's files on the disk itself, should the system crash, before its name."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        for folder, _, names in os.walk(directory.parent):  # all items, written by now
            for name in (*names, ""):
                file = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)


def snapshot(state: TrainState) -> tuple[Specs, dict[str, np.ndarray]]:
    """The manifest's entry of every leaf, and the arrays to store, by path."""
    leaves = jax.device_get(leaves_by_path(state))
    arrays = {path: np.asarray(array, order="C") for path, array in leaves.items()}
    specs = {path: _spec(array) for path, array in arrays.items()}
    return specs, {path: array for path, array in arrays.items() if array.size}


def restore_arrays(folder: Path, template: Any) -> Any:
    """The template's structure, a dataclass, with the arrays of a checkpoint.

    Raises UserError if it is damaged, or its arrays in the template's fields are others.
    """
    leaves = leaves_by_path(template)
    fields = {field.name for field in dataclasses.fields(template)}
    stored = read_manifest(folder)["arrays"].items()
    specs = {path: spec for path, spec in stored if path.split("/")[0] in fields}
    found = {path: spec["type"] for path, spec in specs.items()}
    if wrong := mismatch(found, {path: _type(leaf) for path, leaf in leaves.items()}):
        raise UserError(f"{folder}: does not fit: {wrong}")
    arrays = read_arrays(folder, specs)
    ordered = [arrays.get(path, np.zeros(x.shape, x.dtype)) for path, x in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(template), jax.device_put(ordered))


def mismatch(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """Where the types or shapes of arrays, by name, are not the expected ones; "" if nowhere."""
    wrong = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    return "; ".join(wrong[:3] + [f"and {len(wrong) - 3} more"] * (len(wrong) > 3))


def read_arrays(folder: Path, specs: Specs) -> dict[str, np.ndarray]:
    """The arrays of these paths, except those without elements, which only the manifest has.

    Raises UserError if the checkpoint is damaged.
    """
    stored = {path: spec for path, spec in specs.items() if not re.search(r"\b0\b", spec["type"])}
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(stored, 0),
        restore_args=dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    with reading(folder):
        arrays = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder / ARRAYS), args=args)
        for path, spec in stored.items():
            if _spec(arrays[path]) != spec:
                raise ValueError(f"wrong checksum of {path}")
    return arrays


def read_manifest(folder: Path) -> dict[str, Any]:
    """The configuration, package versions, and specs of the arrays of a checkpoint."""
    with reading(folder):
        return json.loads((folder / "manifest" / "metadata").read_text("utf-8"))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What is damaged is a UserError that names `folder`; what the system says passes."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore document none of what they raise
        if said := system_error(error):
            raise OSError(said.errno, said.strerror, str(folder)) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{folder}: damaged checkpoint ({reason})") from error


def system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one of Orbax's; TensorStore hides its number in a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return None


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _spec(array: np.ndarray) -> dict[str, Any]:
    return {"type": _type(array), "crc32": zlib.crc32(array.tobytes())}
