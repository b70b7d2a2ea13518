"""Reads the MATLAB files of person search data sets (the "MAT-File Format", version 5).

These files hold structs, cells, characters and numbers. The protocols of CUHK-SYSU nest millions of
gallery entries, so a struct array is read entry by entry, and a value is decoded on demand. A value
is handed around as the bytes of its matrix without the tag; b"" is an empty value. All functions
raise ValueError for content that does not follow the format.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

_MATRIX, _COMPRESSED = 14, 15
_KINDS = {1: "cells", 2: "structs", 4: "characters", **dict.fromkeys(range(6, 16), "numbers")}
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_NUMBERS |= {12: "<i8", 13: "<u8"}
_ENCODINGS = {1: "utf-8", 2: "utf-8", 16: "utf-8", 4: "utf-16-le", 17: "utf-16-le"}
_EMPTY = struct.pack("<10I", 6, 8, 6, 0, 5, 8, 0, 0, 1, 0)  # the matrix of []
_CHUNK = 4096  # zlib makes at most a thousand times as many bytes of it


class Entry(dict[str, bytes]):
    """The values of a struct by field; a field that it lacks is a ValueError."""

    def __missing__(self, field: str) -> bytes:
        raise ValueError(f"has no field {field}, but {', '.join(self)}")


def read_structs(path: Path, variable: str) -> Iterator[Entry]:
    """Yields the entries of the struct array `variable`, by field; one entry is in memory."""
    with path.open("rb") as file:
        stream, _ = _find(file, [variable])
        yield from _entries(stream)
        stream.finish()


def read_variable(path: Path, names: Sequence[str]) -> bytes:
    """The value of the first of `names` that the file has."""
    with path.open("rb") as file:
        stream, size = _find(file, names)
        body = stream.read(size)
        stream.finish()
        return body


def structs(body: bytes) -> Iterator[Entry]:
    """The entries of a struct array, by field; none of an empty array of any kind."""
    return _entries(io.BytesIO(body or _EMPTY))


def cells(body: bytes) -> Iterator[bytes]:
    """The values of a cell array, column by column; none of an empty array of any kind."""
    stream = io.BytesIO(body or _EMPTY)
    for _ in range(math.prod(_header(stream, "cells")[1])):
        yield _part(stream)[1]


def numbers(body: bytes) -> Shaped[np.ndarray, "..."]:
    """A numeric array, in the type that it is stored in, which may be smaller than its class."""
    stream = io.BytesIO(body or _EMPTY)
    _, shape = _header(stream, "numbers")
    if not math.prod(shape):
        return np.zeros(shape)
    kind, data = _part(stream)
    if kind not in _NUMBERS:
        raise ValueError(f"holds numbers of type {kind}, which are not read")
    return np.frombuffer(data, _NUMBERS[kind]).reshape(shape, order="F")


def text(body: bytes) -> str:
    """The characters of a char array of one row."""
    stream = io.BytesIO(body or _EMPTY)
    _, shape = _header(stream, "characters")
    if not math.prod(shape):
        return ""
    kind, data = _part(stream)
    if kind not in _ENCODINGS or shape[0] != 1:
        raise ValueError(f"holds characters of type {kind} in shape {shape}, not a text")
    return data.decode(_ENCODINGS[kind])


class _Stream:
    """The content of one element of a file, decompressed as it is read."""

    def __init__(self, file: BinaryIO, kind: int, size: int):
        self._file, self._stored, self._buffer = file, size, bytearray()
        self._inflate = zlib.decompressobj() if kind == _COMPRESSED else None

    def read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def finish(self) -> None:
        """Reads to the end, where zlib compares its checksum."""
        while self._inflate and not self._inflate.eof:
            self._fill()

    def _fill(self) -> None:
        data = self._file.read(min(_CHUNK, self._stored))
        self._stored -= len(data)
        if not data:
            raise ValueError("ends too early")
        try:
            self._buffer += self._inflate.decompress(data) if self._inflate else data
        except zlib.error as error:
            raise ValueError(f"cannot be decompressed ({error})") from error


def _find(file: BinaryIO, names: Sequence[str]) -> tuple[_Stream, int]:
    """The stream of the matrix of the first of `names`, and its size in bytes."""
    head = file.read(128)
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise ValueError(
            "is a MATLAB file of version 7.3 (HDF5), which is not read; in MATLAB, load it and "
            "save it again with save(..., '-v7')"
        )
    if head[124:] != b"\x00\x01IM":
        raise ValueError("is not a little-endian MATLAB file of version 5")
    places: dict[str, int] = {}
    while tag := file.read(8):
        place = file.tell()
        places.setdefault(_header(_open(file, place)[0])[0], place)
        file.seek(place + _tag(tag)[1])
    for name in names:
        if name in places:
            return _open(file, places[name])
    raise ValueError(f"has no variable {' or '.join(names)}, but {', '.join(places) or 'none'}")


def _open(file: BinaryIO, place: int) -> tuple[_Stream, int]:
    """The stream of the matrix whose tag ends at `place`, and its size in bytes."""
    file.seek(place - 8)
    kind, size = _tag(file.read(8))
    stream = _Stream(file, kind, size)
    return stream, _tag(stream.read(8))[1] if kind == _COMPRESSED else size


def _tag(data: bytes) -> tuple[int, int]:
    """Type and size of a part; zeros where the data end."""
    kind, size = struct.unpack("<II", data.ljust(8, b"\0"))
    return kind, size


def _part(stream: _Stream | io.BytesIO) -> tuple[int, bytes]:
    """Type and content of the next part of a matrix."""
    tag = stream.read(8)
    kind, size = _tag(tag)
    if kind >> 16:  # type and size share a word, the content is in the other one
        return kind & 0xFFFF, tag[4 : 4 + min(kind >> 16, 4)]
    data = stream.read(size)
    if len(tag) < 8 or len(data) < size:
        raise ValueError("ends too early")
    stream.read(-size % 8)
    return kind, data


def _header(stream: _Stream | io.BytesIO, expected: str = "") -> tuple[str, tuple[int, ...]]:
    """Name and shape of a matrix; moves on to its content."""
    _, flags = _part(stream)
    _, sides = _part(stream)
    _, name = _part(stream)
    kind = _KINDS.get(flags[0]) if len(flags) == 8 else None
    if kind is None or flags[1] & 8:
        raise ValueError("holds complex numbers or an array of a class that is not read")
    shape = struct.unpack(f"<{len(sides) // 4}I", sides[: len(sides) // 4 * 4]) or (0,)
    if expected not in ("", kind) and math.prod(shape):
        raise ValueError(f"holds {kind} where {expected} belong")
    return name.decode(), shape


def _entries(stream: _Stream | io.BytesIO) -> Iterator[Entry]:
    count = math.prod(_header(stream, "structs")[1])
    size = int.from_bytes(_part(stream)[1], "little") if count else 1
    names = _part(stream)[1] if count else b""
    if count and not (size and names):
        raise ValueError("holds structs without fields")
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    fields = [part.split(b"\0")[0].decode() for part in parts]
    read = stream.read
    for _ in range(count):
        entry = Entry()
        for field in fields:
            tag = read(8)
            kind, size = _tag(tag)
            entry[field] = read(size)
            if kind != _MATRIX or len(tag) < 8 or len(entry[field]) < size:
                raise ValueError("ends too early")
        yield entry
