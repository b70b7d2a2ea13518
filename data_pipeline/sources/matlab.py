"""Reads the MATLAB files of person search data sets (the "MAT-File Format", version 5).

These files hold structs, cells, characters and numbers. The protocols of CUHK-SYSU nest millions of
gallery entries, so a struct array is read entry by entry, and a value is decoded on demand. A value
is the bytes of its matrix without the tag, b"" if it is empty, or a stream of them. All functions
raise ValueError for content that does not follow the format.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from data_pipeline.sources.source import Known

_COMPRESSED = 15
_KINDS = {1: "cells", 2: "structs", 4: "characters", **dict.fromkeys(range(6, 16), "numbers")}
_NUMBERS = Known({1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"})
_NUMBERS |= {12: "<i8", 13: "<u8"}
_ENCODINGS = Known({1: "utf-8", 2: "utf-8", 16: "utf-8", 4: "utf-16-le", 17: "utf-16-le"})
_EMPTY = struct.pack("<10I", 6, 8, 6, 0, 5, 8, 0, 0, 1, 0)  # the matrix of []
_CHUNK = 4096  # zlib makes at most a thousand times as many bytes of it


class Stream:
    """A compressed matrix, decompressed as it is read."""

    def __init__(self, data: bytes):
        self._data, self._buffer = io.BytesIO(data), bytearray()
        self._inflate = zlib.decompressobj().decompress
        self.read(8)  # the tag

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._buffer) < count and (data := self._data.read(_CHUNK)):
            try:
                self._buffer += self._inflate(data)
            except zlib.error as error:
                raise ValueError(f"cannot be decompressed ({error})") from error
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data


def read_variable(path: Path, *names: str) -> bytes | Stream:
    """The value of the first of `names` that the file has; it may be read once."""
    found = Known()
    with path.open("rb") as file:
        head = file.read(128)
        if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
            raise ValueError(
                "is a MATLAB file of version 7.3 (HDF5), which is not read; in MATLAB, load it and "
                "save it again with save(..., '-v7')"
            )
        if head[124:] != b"\x00\x01IM":
            raise ValueError("is not a little-endian MATLAB file of version 5")
        while tag := file.read(8):
            kind, size = struct.unpack("<II", tag.ljust(8, b"\0"))
            matrix, element = Stream if kind == _COMPRESSED else bytes, file.read(size)
            found.setdefault(_header(_open(matrix(element)))[0], (matrix, element))
    matrix, element = found[next((name for name in names if name in found), names[0])]
    return matrix(element)


def structs(value: bytes | Stream) -> Iterator[dict[str, bytes]]:
    """The entries of a struct array, by field; none of an empty array of any kind."""
    stream = _open(value)
    if count := math.prod(_header(stream, "structs")[1]):
        size = int.from_bytes(_part(stream)[1], "little")
        names = _part(stream)[1]
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        fields = [part.split(b"\0")[0].decode() for part in parts]
        for _ in range(count if fields else 0):
            yield Known((field, _part(stream)[1]) for field in fields)


def cells(value: bytes | Stream) -> Iterator[bytes]:
    """The values of a cell array, column by column; none of an empty array of any kind."""
    stream = _open(value)
    for _ in range(math.prod(_header(stream, "cells")[1])):
        yield _part(stream)[1]


def numbers(value: bytes | Stream) -> Shaped[np.ndarray, "..."]:
    """A numeric array, in the type that it is stored in, which may be smaller than its class."""
    shape, kind, data = _data(value, "numbers")
    return np.frombuffer(data, _NUMBERS[kind]).reshape(shape, order="F")


def text(value: bytes | Stream) -> str:
    """The characters of a char array of one row."""
    _, kind, data = _data(value, "characters")
    return data.decode(_ENCODINGS[kind])


def _data(value: bytes | Stream, expected: str) -> tuple[tuple[int, ...], int, bytes]:
    """Shape, type and content of numbers or characters."""
    stream = _open(value)
    _, shape = _header(stream, expected)
    return shape, *(_part(stream) if math.prod(shape) else (2, b""))


def _open(value: bytes | Stream) -> io.BytesIO | Stream:
    return io.BytesIO(value or _EMPTY) if isinstance(value, bytes) else value


def _header(stream: io.BytesIO | Stream, expected: str = "") -> tuple[str, tuple[int, ...]]:
    """Name and shape of a matrix, which is empty or as expected; moves on to its content."""
    number, marks, *_ = _part(stream)[1]
    shape = tuple(np.frombuffer(_part(stream)[1], "<u4").tolist())
    name = _part(stream)[1].decode()
    kind = "complex numbers" if marks & 8 else _KINDS.get(number, "an array of another class")
    if expected not in ("", kind) and math.prod(shape):
        raise ValueError(f"holds {kind} where {expected} belong")
    return name, shape


def _part(stream: io.BytesIO | Stream) -> tuple[int, bytes]:
    """Type and content of the next part of a matrix."""
    tag = stream.read(8)
    kind, size = struct.unpack("<II", tag.ljust(8, b"\0"))
    if kind >> 16:  # type and size share a word, the content is in the other one
        return kind & 0xFFFF, tag[4 : 4 + (kind >> 16)]
    data = stream.read(size)
    if len(tag) < 8 or len(data) < size:
        raise ValueError("ends too early")
    stream.read(-size % 8)
    return kind, data
