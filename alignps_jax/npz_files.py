"""Archives of NumPy arrays (.npz), read without believing what they say of their size."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from alignps_jax.types import UserError

# Packed names and offsets are a tenth of their size; an archive of zeros is a thousandth.
_MOST_PACKED = 20
_ALWAYS_ALLOWED = 16 << 20  # bytes
_MAX_DIMENSIONS = 32
_KINDS = "biufU"


class Field(NamedTuple):
    """What an array has to be: number of dimensions, kinds of its type, and both in words."""

    dimensions: int
    kinds: str
    words: str


def read_npz(path: Path, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """The arrays `fields` of an archive; others in it are not read.

    Nothing is allocated that the file has no bytes for: headers must agree with the size of their
    entry, and all entries that are read unpack to at most 20 times the file (or 16 MiB).

    Raises:
      UserError: there is no such file, it is damaged or cut off, or an array is missing, holds
        Python objects or has another type or number of dimensions.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an .npz file with {', '.join(fields)}")
    try:
        with path.open("rb") as file:
            head = file.read(6)
        if head == b"\x93NUMPY":
            raise UserError(f"{path}: holds one bare array; expected an .npz archive")
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path, fields)
            return {
                name: _read(archive, entries[name], path, name, fields[name]) for name in fields
            }
    except UserError:
        raise
    except Exception as error:  # zipfile documents little of what it raises for a damaged archive
        raise UserError(f"{path}: not a readable .npz archive ({_reason(error)})") from error


def _entries(
    archive: zipfile.ZipFile, path: Path, fields: Mapping[str, Field]
) -> dict[str, zipfile.ZipInfo]:
    names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    for name, field in fields.items():
        if names.count(name) != 1:
            found = ", ".join(repr(other)[:40] for other in names[:8])
            problem = "is missing" if name not in names else "is there twice"
            raise UserError(
                f"{path}: array {name!r} {problem} (found {found or 'none'}); "
                f"expected {field.words}"
            )
    entries = {name: archive.infolist()[names.index(name)] for name in fields}
    packed = path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries.values())
    if unpacked > max(_MOST_PACKED * packed, _ALWAYS_ALLOWED):
        raise UserError(
            f"{path}: found arrays of {unpacked} bytes in a file of {packed} bytes; expected at "
            f"most {_MOST_PACKED} times the file"
        )
    return entries


def _read(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, name: str, field: Field
) -> np.ndarray:
    where = f"{path}: array {name!r}"
    try:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"packed in the way {entry.compress_type}")
        with archive.open(entry) as file:
            dtype, shape, fortran = _header(file)
            _check_size(dtype, shape, entry.file_size - file.tell())
            if dtype.kind not in field.kinds or len(shape) != field.dimensions:
                raise UserError(f"{where} is {dtype} of shape {shape}; expected {field.words}")
            data = file.read()  # to the end, where the archive's checksum is compared
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for shape {shape}")
        array = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
        array = array.reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)
    except UserError:
        raise
    except Exception as error:  # nor does NumPy, of headers
        raise UserError(f"{where} cannot be read ({_reason(error)})") from error


def _header(file: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], bool]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in _KINDS:
        raise ValueError(f"type {str(dtype)[:40]}, expected numbers or text")
    return dtype, shape, fortran


def _check_size(dtype: np.dtype, shape: tuple[int, ...], held: int) -> None:
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= size < 2**48 for size in shape):
        raise ValueError(f"shape {shape}"[:120])
    promised = math.prod(shape) * dtype.itemsize
    if promised != held:
        raise ValueError(f"shape {shape} of {dtype} needs {promised} bytes, found {held}"[:200])


def _reason(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return text if text.isprintable() else ascii(text)
