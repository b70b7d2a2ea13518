"""Files of named tensors: PyTorch's .pth, safetensors, and pickled NumPy arrays (detectron2).

Reading never executes code from a file. PyTorch, the optional extra `torch`, reads and writes its
own format; the others need nothing.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from alignps_jax.types import UserError

Tensors = dict[str, np.ndarray]

_SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "?",
}
# What numpy.ndarray.__reduce__ names, in NumPy 1 and 2; none of it acts on anything but memory.
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: np.ndarray((0,), np.uint8)
        for core in ("core", "_core")
    },
}


def read_tensors(path: Path) -> Tensors:
    """All tensors of a file by name, as NumPy arrays; the format is told from the content.

    Of a dictionary with an entry `state_dict` (mmcv) or `model` (detectron2) that entry is read.

    Raises:
      UserError: there is no such file, it is damaged or cut off, holds anything but tensors, or
        needs PyTorch and PyTorch is not installed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((b"PK", b"\x80\x02\x8a\nl\xfc\x9c")):  # zip, or the magic number of old
        return _named_arrays(path, _load_torch(path))
    if head.startswith(b"\x80"):
        return _named_arrays(path, _load_pickled_arrays(path))
    raise UserError(f"{path}: found an unknown format, expected .pth, .safetensors or .pkl weights")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    """Writes .pth (a dictionary of `meta` and `state_dict`, as mmcv's) or .safetensors.

    The file is there whole or not at all.

    Raises:
      UserError: another suffix, a folder that cannot be written, or no PyTorch for .pth.
    """
    writers = {".pth": _write_torch, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected {' or '.join(writers)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](temporary, tensors, meta)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: PyTorch is not installed, which .pth files need: pip install torch "
            "(.safetensors files do without)"
        ) from error
    return torch


def _load_torch(path: Path) -> Any:
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        culprit = reason.partition("GLOBAL ")[2].split(" ")[0] or reason[:120]
        raise UserError(
            f"{path}: found something else than tensors ({culprit}); nothing of it was executed"
        ) from error
    except Exception as error:  # PyTorch documents none of what it raises for a damaged file
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return UserError(f"{path}: damaged or cut off ({reason})")


def _named_arrays(path: Path, content: Any) -> Tensors:
    for entry in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{path}: found {type(content).__name__}, expected a dictionary of named tensors"
        )
    return {str(name): _array(path, name, value) for name, value in content.items()}


def _array(path: Path, name: Any, value: Any) -> np.ndarray:
    try:
        array = value if isinstance(value, np.ndarray) else value.detach().numpy()
    except (AttributeError, TypeError, RuntimeError) as error:  # not a tensor, bfloat16, sparse
        found = getattr(value, "dtype", type(value).__name__)
        raise UserError(f"{path}: {name!r}: found {found}, expected a float32 tensor") from error
    if array.dtype.hasobject:
        raise UserError(f"{path}: {name!r}: found Python objects, expected numbers")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dictionaries, numbers, strings and NumPy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} ")
        return _ARRAY_PARTS[module, name]


def _load_pickled_arrays(path: Path) -> Any:
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may ask for anything
        if "GLOBAL " in str(error):
            culprit = str(error).partition("GLOBAL ")[2].strip()
            raise UserError(
                f"{path}: found something else than arrays ({culprit}); nothing of it was executed"
            ) from error
        raise _damaged(path, error) from error


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    torch = _torch(path)
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    torch.save({"meta": dict(meta), "state_dict": collections.OrderedDict(state)}, path)


def _read_safetensors(path: Path) -> Tensors:
    """8 bytes with the header's length, the header (JSON), and the tensors' bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        return dict(_safetensors_entries(header, memoryview(data)[end:]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _safetensors_entries(header: dict, body: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _SAFETENSORS_TYPES:
            raise ValueError(f"{name} is {entry['dtype']}")
        dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"{name} lies outside the file")
        if math.prod(entry["shape"]) * dtype.itemsize != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes for shape {entry['shape']}")
        yield name, np.frombuffer(body[begin:end], dtype).reshape(entry["shape"])


def _write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]
) -> None:
    codes = {np.dtype(dtype): code for code, dtype in _SAFETENSORS_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **meta}}
    end = 0
    # Widest type first, which keeps every tensor aligned.
    arrays = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
