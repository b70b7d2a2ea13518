"""The variables of a MATLAB file as streams of bytes (the "MAT-File Format", version 5).

Nothing that a file says about its own size is believed: every length is held against the bytes
that are left before memory is asked for. What is compressed may become at most `RATIO` times as
large as it is stored, or `ALWAYS_ALLOWED` bytes where that is more.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

# A gallery file becomes some forty times as large, deflate's limit is a thousand times.
RATIO = 128
ALWAYS_ALLOWED = 64 << 20

TAG = {"<": struct.Struct("<II"), ">": struct.Struct(">II")}
# The first part of every matrix is its flags: their tag tells the byte order.
FLAGS_TAG = {TAG[order].pack(6, 8): order for order in "<>"}
MATRIX, _COMPRESSED = 14, 15

_HEADER_BYTES = 128
_HDF5 = b"\x89HDF\r\n\x1a\n"
# Bytes that are read, and that are decompressed, at a time.
_CHUNK, _INFLATED = 1 << 16, 1 << 20


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable: the start of its matrix (flags, size and name), and the stream of the rest."""

    head: bytes
    stream: Stream


class Stream:
    """What stands in one element of a file, decompressed as it is read.

    Attributes:
      order: byte order, `<` or `>`.
      kind: the element's type; of a compressed one, the type of what is in it.
      left: bytes of it that are still to be read.
    """

    def __init__(self, file: BinaryIO, kind: int, size: int, order: str):
        """Takes the element whose content, `size` bytes of the file, starts at its position.

        Raises:
          ValueError: it is compressed and promises more than `size` bytes may become.
        """
        self.order = order
        self.kind = kind
        self.left = size
        self._file = file
        self._stored = size
        self._inflate = None
        self._data, self._position = b"", 0
        if kind == _COMPRESSED:
            self._inflate = zlib.decompressobj()
            self.left = 8
            self.kind, self.left = TAG[order].unpack(self.read(8))
            allowed = max(ALWAYS_ALLOWED, RATIO * size)
            if self.left > allowed:
                raise ValueError(
                    f"{size} compressed bytes promise to become {self.left}, more than {allowed}"
                )

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes.

        Raises:
          ValueError: fewer are left, or what is compressed is damaged.
        """
        if count > self.left:
            raise ValueError(f"a part promises {count} bytes where {self.left} are left")
        self.left -= count
        begin, self._position = self._position, self._position + count
        if self._position <= len(self._data):
            return self._data[begin : self._position]
        pieces = [self._data[begin:]]
        missing = count - len(pieces[0])
        while missing:
            self._data = self._next()
            if not self._data:
                raise ValueError("ends too early")
            self._position = min(missing, len(self._data))
            pieces.append(self._data[: self._position])
            missing -= self._position
        return b"".join(pieces)

    def part(self) -> bytes:
        """A part of a matrix (anything but another matrix), its tag and padding included."""
        head = self.read(8)
        kind, size = TAG[self.order].unpack(head)
        # A short part shares the tag's eight bytes.
        return head if kind >> 16 else head + self._padded(size)

    def matrix(self) -> bytes:
        """A matrix, without its tag."""
        kind, size = TAG[self.order].unpack(self.read(8))
        if kind != MATRIX:
            raise ValueError(f"found an element of type {kind}, not a matrix")
        return self.read(size)

    def finish(self) -> None:
        """Checks that nothing but padding is left, and the checksum of what was decompressed.

        Raises:
          ValueError: otherwise.
        """
        if self.left >= 8:
            raise ValueError(f"{self.left} bytes follow its last value")
        if self._inflate is None:
            return
        self.read(self.left)
        if self._position < len(self._data) or self._next():
            raise ValueError("more was compressed than the size says")
        if not self._inflate.eof:
            raise ValueError("ends too early")

    def _padded(self, size: int) -> bytes:
        """`size` bytes and their padding to a multiple of eight, which the last part may lack."""
        return self.read(size if size > self.left else min(size + -size % 8, self.left))

    def _next(self) -> bytes:
        """The next bytes, a limited number of them; b"" at the end."""
        if self._inflate is None:
            return self._stored_bytes()
        try:
            while not self._inflate.eof:
                fetched = self._inflate.unconsumed_tail or self._stored_bytes()
                data = self._inflate.decompress(fetched, _INFLATED)
                if data or not fetched:
                    return data
        except zlib.error as error:
            raise ValueError(f"what is compressed is damaged ({error})") from error
        return b""

    def _stored_bytes(self) -> bytes:
        fetched = self._file.read(min(_CHUNK, self._stored))
        self._stored -= len(fetched)
        return fetched


def variables(file: BinaryIO) -> Iterator[Variable]:
    """The variables of a file in its order; each must be read before the next one is asked for.

    Raises:
      ValueError: the file is damaged or of another version.
    """
    order = _byte_order(file.read(_HEADER_BYTES))
    end = file.seek(0, os.SEEK_END)
    position = _HEADER_BYTES
    while position < end:
        file.seek(position)
        tag = file.read(8)
        kind, size = TAG[order].unpack(tag) if len(tag) == 8 else (MATRIX, 8)
        position += 8 + size
        if position > end:
            raise ValueError("ends too early")
        stream = Stream(file, kind, size, order)
        if stream.kind != MATRIX:
            raise ValueError(f"found an element of type {stream.kind}, not a matrix")
        yield Variable(stream.read(16) + stream.part() + stream.part(), stream)


def _byte_order(head: bytes) -> str:
    if head.startswith(_HDF5) or head[124:] in (b"\x00\x02IM", b"\x02\x00MI"):
        raise ValueError(
            "is a MATLAB file of version 7.3 (HDF5), which is not read: "
            "in MATLAB, load it and save it again with save(..., '-v7')"
        )
    orders = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
    if head[124:] not in orders:
        raise ValueError("is no MATLAB file of version 5")
    return orders[head[124:]]
