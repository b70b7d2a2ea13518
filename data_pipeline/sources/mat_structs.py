"""Values of MATLAB files (the "MAT-File Format", version 5), struct arrays entry after entry.

The protocols of CUHK-SYSU are millions of gallery entries in nested structs: objects of all of
them would cost gigabytes and minutes. Here only one entry of the outermost array is in memory at a
time, and a value is decoded only when it is asked for. Nothing here calls itself, so it does not
matter how deep a file nests.

A value is handed around as the bytes of its matrix element without the tag (b"" for an empty one).
Whatever is not as the format has it is a ValueError.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from data_pipeline.sources.mat_stream import FLAGS_TAG, MATRIX, TAG, Stream, Variable, variables

_CLASSES = {
    1: "cell",
    2: "struct",
    3: "object",
    4: "char",
    5: "sparse",
    6: "double",
    7: "single",
    8: "int8",
    9: "uint8",
    10: "int16",
    11: "uint16",
    12: "int32",
    13: "uint32",
    14: "int64",
    15: "uint64",
    16: "function",
    17: "opaque",
}
_NUMERIC = frozenset(_CLASSES[number] for number in range(6, 16))
# Types of what is stored in them.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_TEXT = {
    **dict.fromkeys((1, 2, 16), ("utf-8", "utf-8")),
    **dict.fromkeys((4, 17), ("utf-16-le", "utf-16-be")),
    18: ("utf-32-le", "utf-32-be"),
}
_MAX_DIMENSIONS = 32


@dataclasses.dataclass(frozen=True)
class Structs:
    """A struct array inside another value: the names of its fields, and its entries."""

    fields: tuple[str, ...]
    count: int
    body: bytes = dataclasses.field(repr=False)
    start: int
    order: str

    @classmethod
    def of(cls, body: bytes) -> Structs:
        """Takes a matrix apart; ValueError if it is not a struct array (an empty one is)."""
        head = _header(body) if body else _EMPTY
        # MATLAB writes [] for a struct array without entries.
        if head.kind != "struct" and head.size == 0:
            return cls((), 0, b"", 0, "<")
        _check_class(head, "struct")
        _, length, position = _part(body, head.position, head.order)
        _, names, position = _part(body, position, head.order)
        fields = _field_names(length, names, head.order)
        _check_promise(head.size, len(fields), len(body) - position)
        return cls(fields, head.size, body, position, head.order)

    def __iter__(self) -> Iterator[list[bytes]]:
        """Entry after entry, the values of its fields."""
        body, position, end = self.body, self.start, len(self.body)
        tag = TAG[self.order].unpack_from
        for _ in range(self.count):
            row = []
            for _ in self.fields:
                begin = position + 8
                kind, size = tag(body, position) if begin <= end else (MATRIX, 1)
                position = begin + size
                if position > end or kind != MATRIX:
                    raise _not_a_matrix(kind)
                row.append(body[begin:position])
            yield row
        if end - position >= 8:
            raise ValueError(f"{end - position} bytes follow the last entry")

    def only(self) -> list[bytes]:
        """The values of the fields of a single entry; ValueError if there are more, or none."""
        if self.count != 1:
            raise ValueError(f"found {self.count} structs where one should be")
        (row,) = self
        return row


def read_structs(path: Path, variable: str) -> Iterator[dict[str, bytes]]:
    """The entries of the struct array `variable` of a file, by field.

    Raises:
      ValueError, OSError: the file is damaged, of another version or does not hold such a
        variable. Whether all of it is sound is known after the last entry only.
    """
    found = []
    with path.open("rb") as file:
        for candidate in variables(file):
            head = _header(candidate.head)
            found.append(head.name)
            if head.name == variable:
                yield from _entries(candidate.stream, head)
                return
    raise ValueError(f"holds the variables {', '.join(found) or 'none'}")


def read_variable(path: Path, names: Sequence[str]) -> bytes:
    """The value of the first of `names` that a file has.

    Raises:
      ValueError, OSError: the file is damaged, of another version or holds none of them.
    """
    found = {}
    with path.open("rb") as file:
        for candidate in variables(file):
            name = _header(candidate.head).name
            found[name] = _rest(candidate) if name in names else b""
    for name in names:
        if name in found:
            return found[name]
    raise ValueError(f"holds the variables {', '.join(found) or 'none'}")


def class_of(body: bytes) -> str:
    """MATLAB's name for the class of a value, such as `cell`, `char` or `double`."""
    return (_header(body) if body else _EMPTY).kind


def cells(body: bytes) -> Iterator[bytes]:
    """The values in a cell array, column after column; none in an empty one of any class."""
    head = _header(body) if body else _EMPTY
    if head.size == 0:
        return
    _check_class(head, "cell")
    _check_promise(head.size, 1, len(body) - head.position)
    yield from (value for (value,) in Structs(("",), head.size, body, head.position, head.order))


def numbers(body: bytes) -> Shaped[np.ndarray, "n"]:
    """The values of a numeric array in a row, column after column; none of an empty one.

    They have the type that they are stored in, often a smaller one than the array's.
    """
    return _numbers(body)[1]


def matrix(body: bytes) -> Shaped[np.ndarray, "rows columns"]:
    """The values of a numeric array of two dimensions, in the type that they are stored in."""
    head, values = _numbers(body)
    if len(head.dims) != 2:
        raise ValueError(f"found an array of {len(head.dims)} dimensions, not two")
    return values.reshape(head.dims, order="F")


def text(body: bytes) -> str:
    """The characters of a char array of one row."""
    head = _header(body) if body else _EMPTY
    if head.size == 0 and head.kind in ("char", "double"):
        return ""
    _check_class(head, "char")
    kind, data, _ = _part(body, head.position, head.order)
    if kind not in _TEXT:
        raise ValueError(f"found characters of type {kind}")
    characters = data.decode(_TEXT[kind][head.order == ">"])
    # MATLAB counts units of UTF-16, SciPy writes the number of characters.
    lengths = (len(characters), len(characters.encode("utf-16-le")) // 2)
    if head.dims[:-1] != (1,) or head.size not in lengths:
        raise ValueError(
            f"found {len(characters)} characters in an array of {_times(head.dims)}, not one row "
            "of text"
        )
    return characters


class _Header(NamedTuple):
    """What a matrix says about itself, and where its content starts."""

    order: str
    kind: str
    is_complex: bool
    dims: tuple[int, ...]
    size: int
    name: str
    position: int


_EMPTY = _Header("<", "double", False, (0, 0), 0, "", 0)


def _header(body: bytes) -> _Header:
    order = FLAGS_TAG.get(body[:8])
    if order is None or len(body) < 16:
        raise ValueError("found no matrix where one should be")
    flags = TAG[order].unpack_from(body, 8)[0]
    kind, dims, position = _part(body, 16, order)
    _, name, position = _part(body, position, order)
    if flags & 0xFF not in _CLASSES:
        raise ValueError(f"found an array of class {flags & 0xFF}, which does not exist")
    if kind != 5 or len(dims) % 4 or not 2 <= len(dims) // 4 <= _MAX_DIMENSIONS:
        raise ValueError(f"found a size of {len(dims)} bytes and type {kind}")
    sides = _sides(dims, order)
    return _Header(
        order,
        _CLASSES[flags & 0xFF],
        bool(flags & 0x800),
        sides,
        math.prod(sides),
        name.decode(),
        position,
    )


@functools.lru_cache(maxsize=1024)
def _sides(dims: bytes, order: str) -> tuple[int, ...]:
    sides = tuple(np.frombuffer(dims, f"{order}i4").tolist())
    if min(sides) < 0:
        raise ValueError(f"found an array of {_times(sides)}")
    return sides


def _part(body: bytes, position: int, order: str) -> tuple[int, bytes, int]:
    """Type and content of a part, and where the next one starts."""
    start = position + 8
    if start > len(body):
        raise ValueError("ends too early")
    kind, size = TAG[order].unpack_from(body, position)
    if kind >> 16:  # type and size share a word, the content is in the other one
        kind, size = kind & 0xFFFF, kind >> 16
        if size > 4:
            raise ValueError(f"a short part promises {size} bytes, more than its four")
        return kind, body[position + 4 : position + 4 + size], start
    if start + size > len(body):
        raise ValueError(f"a part promises {size} bytes where {len(body) - start} are left")
    return kind, body[start : start + size], start + size + -size % 8


def _numbers(body: bytes) -> tuple[_Header, Shaped[np.ndarray, "n"]]:
    if not body:
        return _EMPTY, np.zeros(0)
    head = _header(body)
    kind, data, _ = _part(body, head.position, head.order)
    if head.kind not in _NUMERIC or head.is_complex:
        what = "complex numbers" if head.is_complex else f"an array of class {head.kind}"
        raise ValueError(f"found {what}, not of real numbers")
    if kind not in _NUMBERS:
        raise ValueError(f"found numbers of type {kind}")
    stored = np.dtype(f"{head.order}{_NUMBERS[kind]}")
    if len(data) != head.size * stored.itemsize:
        raise ValueError(
            f"found {len(data)} bytes of {stored.name} in an array of {_times(head.dims)}"
        )
    return head, np.frombuffer(data, stored)


def _entries(stream: Stream, head: _Header) -> Iterator[dict[str, bytes]]:
    _check_class(head, "struct")
    _, length, _ = _part(stream.part(), 0, head.order)
    _, names, _ = _part(stream.part(), 0, head.order)
    fields = _field_names(length, names, head.order)
    _check_promise(head.size, len(fields), stream.left)
    for _ in range(head.size):
        yield {field: stream.matrix() for field in fields}
    stream.finish()


def _rest(variable: Variable) -> bytes:
    """The complete matrix of a variable."""
    body = variable.head + variable.stream.read(variable.stream.left)
    variable.stream.finish()
    return body


def _field_names(length: bytes, names: bytes, order: str) -> tuple[str, ...]:
    """Field names, each padded to the given length."""
    size = int.from_bytes(length, "little" if order == "<" else "big")
    if size < 1 or len(names) % size:
        raise ValueError(f"found field names of {size} bytes in {len(names)}")
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    fields = tuple(part.split(b"\0")[0].decode() for part in parts)
    if len(set(fields)) < len(fields) or "" in fields:
        raise ValueError("found two fields of the same name, or one without a name")
    return fields


def _check_class(head: _Header, expected: str) -> None:
    if head.kind != expected:
        raise ValueError(f"found an array of class {head.kind}, not {expected}")


def _check_promise(count: int, fields: int, left: int) -> None:
    """Every value of every entry has a tag, at least."""
    if count and not fields:
        raise ValueError("found structs without fields")
    if count * fields * 8 > left:
        raise ValueError(f"{count} entries of {fields} values are promised in {left} bytes")


def _not_a_matrix(kind: int) -> ValueError:
    if kind != MATRIX:
        return ValueError(f"found an element of type {kind}, not a matrix")
    return ValueError("ends too early")


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
