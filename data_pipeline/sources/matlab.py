"""Reads the MATLAB files of person search data sets (the "MAT-File Format", version 5).

These files hold structs, cells, characters and numbers. The protocols of CUHK-SYSU nest millions of
gallery entries, so a struct array is read entry by entry, and a value is decoded on demand. A value
is handed around as the bytes of its matrix without the tag; b"" is an empty value. All functions
raise ValueError for content that does not follow the format.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

_TAG = struct.Struct("<II")
_FLAGS_TAG = _TAG.pack(6, 8)  # the first part of every matrix
_MATRIX, _COMPRESSED = 14, 15
_KINDS = {1: "cells", 2: "structs", 4: "characters", **dict.fromkeys(range(6, 16), "numbers")}
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_NUMBERS |= {12: "<i8", 13: "<u8"}
_ENCODINGS = {1: "utf-8", 2: "utf-8", 16: "utf-8", 4: "utf-16-le", 17: "utf-16-le"}
_CHUNK = 4096  # zlib makes at most a thousand times as many bytes of it


class Entry(dict[str, bytes]):
    """The values of a struct by field; a field that it lacks is a ValueError."""

    def __missing__(self, field: str) -> bytes:
        raise ValueError(f"has no field {field}, but {', '.join(self)}")


def read_structs(path: Path, variable: str) -> Iterator[Entry]:
    """Yields the entries of the struct array `variable`, by field; one entry is in memory."""
    with path.open("rb") as file:
        start, stream = _find(file, [variable])
        _, shape, _ = _header(start, "structs")
        fields, _ = _fields(stream.part() + stream.part(), 0)
        for _ in range(math.prod(shape)):
            yield Entry((field, stream.part()[8:]) for field in fields)
        stream.finish()


def read_variable(path: Path, names: Sequence[str]) -> bytes:
    """The value of the first of `names` that the file has."""
    with path.open("rb") as file:
        start, stream = _find(file, names)
        body = start + stream.read(stream.left)
        stream.finish()
        return body


def structs(body: bytes) -> Iterator[Entry]:
    """The entries of a struct array, by field; none of an empty array of any kind."""
    _, shape, position = _header(body, "structs")
    if math.prod(shape):
        fields, position = _fields(body, position)
        yield from _entries(body, position, fields, shape)


def cells(body: bytes) -> Iterator[bytes]:
    """The values of a cell array, column by column; none of an empty array of any kind."""
    _, shape, position = _header(body, "cells")
    for entry in _entries(body, position, ("value",), shape):
        yield entry["value"]


def numbers(body: bytes) -> Shaped[np.ndarray, "..."]:
    """A numeric array, in the type that it is stored in, which may be smaller than its class."""
    _, shape, position = _header(body, "numbers")
    if not math.prod(shape):
        return np.zeros(shape)
    kind, data, _ = _part(body, position)
    if kind not in _NUMBERS:
        raise ValueError(f"holds numbers of type {kind}, which are not read")
    return np.frombuffer(data, _NUMBERS[kind]).reshape(shape, order="F")


def text(body: bytes) -> str:
    """The characters of a char array of one row."""
    _, shape, position = _header(body, "characters")
    if not math.prod(shape):
        return ""
    kind, data, _ = _part(body, position)
    if kind not in _ENCODINGS or shape[0] != 1:
        raise ValueError(f"holds characters of type {kind} in shape {shape}, not a text")
    return data.decode(_ENCODINGS[kind])


class _Stream:
    """The matrix in one element of a file, decompressed as it is read; `left` bytes remain."""

    def __init__(self, file: BinaryIO, kind: int, size: int):
        self.left = size
        self._file, self._stored, self._buffer = file, size, bytearray()
        self._inflate = zlib.decompressobj() if kind == _COMPRESSED else None
        if kind == _COMPRESSED:
            self.left = 8
            _, self.left = _TAG.unpack(self.read(8))

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("ends too early")
        while len(self._buffer) < count:
            self._fill()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self.left -= count
        return data

    def part(self) -> bytes:
        """The next part of the matrix, with its tag and padding."""
        tag = self.read(8)
        kind, size = _TAG.unpack(tag)
        return tag if kind >> 16 else tag + self.read(size + -size % 8)

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


def _find(file: BinaryIO, names: Sequence[str]) -> tuple[bytes, _Stream]:
    """The first of `names`: flags, shape and name of its matrix, and the stream of the rest."""
    head = file.read(128)
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise ValueError(
            "is a MATLAB file of version 7.3 (HDF5), which is not read; in MATLAB, load it and "
            "save it again with save(..., '-v7')"
        )
    if head[124:] != b"\x00\x01IM":
        raise ValueError("is not a little-endian MATLAB file of version 5")
    for name in names:
        found = []
        file.seek(len(head))
        while tag := file.read(8):
            kind, size = _TAG.unpack(tag.ljust(8, b"\0"))
            end = file.tell() + size
            stream = _Stream(file, kind, size)
            start = stream.read(16) + stream.part() + stream.part()
            found.append(_header(start)[0])
            if found[-1] == name:
                return start, stream
            file.seek(end)
    raise ValueError(f"has no variable {' or '.join(names)}, but {', '.join(found) or 'none'}")


def _header(body: bytes, expected: str = "") -> tuple[str, tuple[int, ...], int]:
    """Name and shape of a matrix, and the position of its content."""
    if not body:
        return "", (0, 0), 0
    kind = _KINDS.get(body[8]) if body[:8] == _FLAGS_TAG and len(body) > 16 else None
    if kind is None or body[9] & 8:
        raise ValueError("holds complex numbers or an array of a class that is not read")
    _, sides, position = _part(body, 16)
    _, name, position = _part(body, position)
    shape = struct.unpack(f"<{len(sides) // 4}I", sides[: len(sides) // 4 * 4]) or (0,)
    if expected not in ("", kind) and math.prod(shape):
        raise ValueError(f"holds {kind} where {expected} belong")
    return name.decode(), shape, position


def _part(body: bytes, position: int) -> tuple[int, bytes, int]:
    """Type and content of the part at `position`, and the position of the next one."""
    start = position + 8
    if start > len(body):
        raise ValueError("ends too early")
    kind, size = _TAG.unpack_from(body, position)
    if kind >> 16:  # type and size share a word, the content is in the other one
        return kind & 0xFFFF, body[start - 4 : start - 4 + min(kind >> 16, 4)], start
    if start + size > len(body):
        raise ValueError("ends too early")
    return kind, body[start : start + size], start + size + -size % 8


def _fields(body: bytes, position: int) -> tuple[tuple[str, ...], int]:
    """The field names of a struct array at `position`, and the position of its values."""
    _, length, position = _part(body, position)
    _, names, position = _part(body, position)
    size = int.from_bytes(length, "little")
    if size < 1 or not names:
        raise ValueError("holds structs without fields")
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return tuple(part.split(b"\0")[0].decode() for part in parts), position


def _entries(
    body: bytes, position: int, fields: Sequence[str], shape: tuple[int, ...]
) -> Iterator[Entry]:
    """The matrices from `position` on, taken together by `fields`."""
    end, unpack = len(body), _TAG.unpack_from
    for _ in range(math.prod(shape)):
        entry = Entry()
        for field in fields:
            begin = position + 8
            kind, size = unpack(body, position) if begin <= end else (_MATRIX, 1)
            position = begin + size
            if position > end or kind != _MATRIX:
                raise ValueError("ends too early")
            entry[field] = body[begin:position]
        yield entry
