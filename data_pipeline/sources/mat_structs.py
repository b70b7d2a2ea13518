"""Struct arrays of MATLAB files, entry after entry (the "MAT-File Format", version 5).

SciPy makes objects of a whole file at once. For the protocols of CUHK-SYSU, millions of gallery
entries in nested structs, that costs gigabytes and minutes; here only one entry of the outermost
array is in memory at a time, and a value is decoded only when it is asked for.

A value is handed around as the bytes of its matrix element without the tag (b"" for an empty one).
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

_TAG = struct.Struct("<II")
_MATRIX, _COMPRESSED = 14, 15
# Classes of arrays.
_STRUCT, _CHAR = 2, 4
_NUMERIC = range(6, 16)
# Types of what is stored in them.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_TEXT = {1: "utf-8", 2: "utf-8", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
# Bytes that are read at a time; compressed ones become some thirty times as many.
_CHUNK = 1 << 17


@dataclasses.dataclass(frozen=True)
class Structs:
    """A struct array inside another one: the names of its fields, and its entries."""

    fields: tuple[str, ...]
    count: int
    body: bytes = dataclasses.field(repr=False)
    start: int

    @classmethod
    def of(cls, body: bytes) -> Structs:
        """Takes a matrix apart; ValueError if it is not a struct array (an empty one is)."""
        if not body:
            return cls((), 0, body, 0)
        kind, count, position = _header(body)
        if kind != _STRUCT:
            # MATLAB writes [] for a struct array without entries.
            if count == 0:
                return cls((), 0, body, 0)
            raise ValueError(f"found an array of class {kind}, not of structs")
        _, length, position = _part(body, position)
        _, names, position = _part(body, position)
        return cls(_names(length, names), count, body, position)

    def __iter__(self) -> Iterator[list[bytes]]:
        """Entry after entry, the values of its fields."""
        body, position, tag = self.body, self.start, _TAG.unpack_from
        for _ in range(self.count):
            row = []
            for _ in self.fields:
                begin = position + 8
                position = begin + tag(body, position)[1]
                row.append(body[begin:position])
            yield row


def read_structs(path: Path, variable: str) -> Iterator[dict[str, bytes]]:
    """The entries of the struct array `variable` of a file, by field.

    Raises:
      ValueError, OSError, EOFError, struct.error, zlib.error: the file is damaged, of another
        version or does not hold such a variable.
    """
    found = []
    with path.open("rb") as file:
        head = file.read(128)
        if head[124:128] != b"\x00\x01IM":
            raise ValueError("not a MATLAB file of version 5")
        while tag := file.read(8):
            kind, size = _TAG.unpack(tag)
            following = file.tell() + size
            stream = _Stream(file, size, compressed=kind == _COMPRESSED)
            if kind == _COMPRESSED:
                kind, size = _TAG.unpack(stream.read(8))
            if kind == _MATRIX:
                (flags, _), dims = struct.unpack("<II", stream.part()), stream.part()
                name = stream.part().decode()
                found.append(name)
                if name == variable:
                    yield from _entries(stream, flags & 0xFF, dims)
                    return
            file.seek(following)
    raise ValueError(f"holds the variables {', '.join(found) or 'none'}")


def numbers(body: bytes) -> Shaped[np.ndarray, "n"]:
    """The values of a numeric array in a row, column after column; none of an empty one."""
    if not body:
        return np.zeros(0)
    array, _, position = _header(body)
    kind, data, _ = _part(body, position)
    if array not in _NUMERIC or kind not in _NUMBERS:
        raise ValueError(f"found an array of class {array} and type {kind}, not of numbers")
    return np.frombuffer(data, np.dtype(_NUMBERS[kind]).newbyteorder("<"))


def text(body: bytes) -> str:
    """The characters of a char array."""
    if not body:
        return ""
    array, _, position = _header(body)
    kind, data, _ = _part(body, position)
    if array != _CHAR or kind not in _TEXT:
        raise ValueError(f"found an array of class {array} and type {kind}, not of characters")
    return data.decode(_TEXT[kind])


class _Stream:
    """What stands in one element of a file, decompressed as it is read."""

    def __init__(self, file: BinaryIO, size: int, *, compressed: bool):
        self._file = file
        self._left = size
        self._inflate = zlib.decompressobj() if compressed else None
        self._data = b""
        self._position = 0

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes; EOFError if there are fewer."""
        while len(self._data) - self._position < count:
            fetched = self._file.read(min(_CHUNK, self._left))
            if not fetched:
                raise EOFError("the file ends too early")
            self._left -= len(fetched)
            more = self._inflate.decompress(fetched) if self._inflate else fetched
            self._data = self._data[self._position :] + more
            self._position = 0
        self._position += count
        return self._data[self._position - count : self._position]

    def part(self) -> bytes:
        """The content of a part of a matrix (anything but another matrix)."""
        head = self.read(8)
        kind, size = _TAG.unpack(head)
        if kind >> 16:  # type and size share a word, the content is in the other one
            return head[4 : 4 + (kind >> 16)]
        return self.read(size + -size % 8)[:size]

    def matrix(self) -> bytes:
        """A matrix, without its tag."""
        kind, size = _TAG.unpack(self.read(8))
        if kind != _MATRIX:
            raise ValueError(f"found an element of type {kind}, not a matrix")
        return self.read(size)


def _entries(stream: _Stream, kind: int, dims: bytes) -> Iterator[dict[str, bytes]]:
    if kind != _STRUCT:
        raise ValueError(f"holds an array of class {kind}, not of structs")
    length = stream.part()
    fields = _names(length, stream.part())
    for _ in range(math.prod(np.frombuffer(dims, "<i4").tolist())):
        yield {field: stream.matrix() for field in fields}


def _names(length: bytes, names: bytes) -> tuple[str, ...]:
    """Field names, each padded to the given length."""
    size = int.from_bytes(length, "little")
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return tuple(part.split(b"\0")[0].decode() for part in parts)


def _header(body: bytes) -> tuple[int, int, int]:
    """Class of a matrix, its number of entries, and where its content starts."""
    _, flags, position = _part(body, 0)
    _, dims, position = _part(body, position)
    _, _, position = _part(body, position)
    return flags[0], math.prod(np.frombuffer(dims, "<i4").tolist()), position


def _part(body: bytes, position: int) -> tuple[int, bytes, int]:
    """Type and content of a part, and where the next one starts."""
    kind, size = _TAG.unpack_from(body, position)
    if kind >> 16:
        return kind & 0xFFFF, body[position + 4 : position + 4 + (kind >> 16)], position + 8
    start = position + 8
    return kind, body[start : start + size], start + size + -size % 8
