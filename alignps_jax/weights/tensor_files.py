"""Files of named tensors: PyTorch's .pth, safetensors, and pickled NumPy arrays (detectron2).

Reading never executes code from a file, and believes nothing that a file says of its size. PyTorch,
the optional extra `torch`, reads and writes its own format; the others do without.
"""

from __future__ import annotations

import collections
import pickle
import re
import stat
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alignps_jax.files import check_outputs, complete_file
from alignps_jax.types import UserError
from alignps_jax.weights.pickled_arrays import ForeignObjectError, PickledArray, load_pickled

Tensors = dict[str, np.ndarray]

# Older ones have published ways to run code, or to corrupt memory, even from `weights_only` loads.
_OLDEST_TORCH = (2, 10)
# safetensors' names of the types that NumPy has.
_NUMBERS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
# All tensors together may be larger than the file, where several share their bytes; so much.
_MOST_SHARED = 2


def read_tensors(path: Path) -> Tensors:
    """All tensors of a file by name, as NumPy arrays; the format is told from the content.

    Of a dictionary with an entry `state_dict` (mmcv) or `model` (detectron2) that entry is read.

    Raises:
      UserError: there is no such file, it is damaged or cut off, holds anything but tensors of
        finite numbers, or needs a PyTorch that is not installed.
    """
    head, size = _head(path)
    if head[8:9] == b"{":
        tensors = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80\x02\x8a\nl\xfc\x9c")):  # zip, or the old magic number
        tensors = _named_arrays(path, _load_torch(path, size))
    elif head.startswith(b"\x80"):
        tensors = _named_arrays(path, _load_pickled_arrays(path))
    else:
        raise UserError(
            f"{path}: found an unknown format, expected .pth, .safetensors or .pkl weights"
        )
    # Tensors of PyTorch can be terabytes of the same few bytes.
    total = sum(array.nbytes for array in tensors.values())
    if total > _MOST_SHARED * size:
        raise UserError(f"{path}: found tensors of {total} bytes in a file of {size} bytes")
    bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(f"{path}: not finite: {listed(bad)}")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    """Writes .pth (a dictionary of `meta` and `state_dict`, as mmcv's) or .safetensors.

    The file is complete or not there at all.

    Raises:
      UserError: as `check_target`.
    """
    check_target(path)  # or an error would name the temporary file
    try:
        with complete_file(path) as temporary:
            _WRITERS[path.suffix](temporary, tensors, meta)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({_reason(error)})") from error


def check_target(path: Path) -> None:
    """Finds out whether `write_tensors` could write this file; leaves nothing behind.

    Raises:
      UserError: another suffix, a folder that cannot be written, or no PyTorch for .pth.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected {' or '.join(_WRITERS)}")
    if path.suffix == ".pth":
        _torch(path)
    check_outputs(path)


def listed(names: Iterable[str], count: int = 3) -> str:
    """The first names, as one line whatever is in them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(_printable(name) for name in names[:count]) + more


def _printable(text: str, length: int = 150) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= length else f"{text[:length]}..."


def _head(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size in bytes."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: found a folder or a device, expected a file of weights")
        with path.open("rb") as file:
            return file.read(16), about.st_size
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from error


def _torch(path: Path) -> ModuleType:
    oldest = ".".join(map(str, _OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: .pth files need PyTorch, which is not installed: pip install '.[torch]' "
            "(.safetensors files do without)"
        ) from error
    numbers = re.findall(r"\d+", torch.__version__)
    if tuple(map(int, numbers[:2])) < _OLDEST_TORCH:
        raise UserError(
            f"{path}: found PyTorch {torch.__version__}, expected {oldest} or newer: a crafted "
            f".pth file can run code in an older one: pip install 'torch>={oldest}'"
        )
    return torch


def _load_torch(path: Path, size: int) -> Any:
    torch = _torch(path)
    try:
        _check_zip(path, size)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        culprit = reason.partition("GLOBAL ")[2].split(" ")[0] or reason[:120]
        raise UserError(
            f"{path}: found something else than tensors ({_printable(culprit)}); nothing of it "
            "was executed"
        ) from error
    except Exception as error:  # PyTorch documents none of what it raises for a damaged file
        raise _damaged(path, error) from error


def _check_zip(path: Path, size: int) -> None:
    """Raises ValueError for an archive that unpacks to more than it is; PyTorch never packs."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(f"{unpacked} bytes in a file of {size} bytes")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or cut off ({_reason(error)})")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return _printable(" ".join(text.split()))


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
    if not isinstance(name, str):
        raise UserError(f"{path}: found a key of type {type(name).__name__}, expected a name")
    try:
        array: Any = value.value if isinstance(value, PickledArray) else value.detach().numpy()
        if array.dtype.kind not in "fiu":
            raise TypeError
    except (AttributeError, TypeError, RuntimeError) as error:  # not a tensor, bfloat16, sparse
        found = getattr(value, "dtype", type(value).__name__)
        raise UserError(
            f"{path}: {_printable(name)!r}: found {found}, expected a float32 tensor"
        ) from error
    return array


def _load_pickled_arrays(path: Path) -> Any:
    try:
        return load_pickled(path.read_bytes())
    except ForeignObjectError as error:
        raise UserError(
            f"{path}: found something else than arrays ({_printable(str(error))}); nothing of it "
            "was executed"
        ) from error
    except (OSError, ValueError, MemoryError) as error:
        raise _damaged(path, error) from error


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    torch = _torch(path)
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    torch.save({"meta": dict(meta), "state_dict": collections.OrderedDict(state)}, path)


def _read_safetensors(path: Path) -> Tensors:
    try:
        # Not mapped into memory: that kills the process if the file is cut off while it is read.
        with safe_open(path, framework="numpy", backend="pread") as file:
            names = list(file.keys())
            types = {name: file.get_slice(name).get_dtype() for name in names}
            other = [name for name in names if types[name] not in _NUMBERS]
            if other:
                raise UserError(
                    f"{path}: {_printable(other[0])!r}: found {types[other[0]]}, expected F32"
                )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise _damaged(path, error) from error


def _write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]
) -> None:
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    save_file(arrays, path, {"format": "pt", **meta})


_WRITERS = {".pth": _write_torch, ".safetensors": _write_safetensors}
