"""Pickled dictionaries of NumPy arrays (Caffe2, detectron2), read without unpickling.

A pickle is a program for a small stack machine, and Python's machine imports and calls whatever the
program names. The machine here imports and calls nothing: it knows the few instructions that
dictionaries, lists, numbers, text and arrays need, and the names that NumPy's pickles use stand for
records of shape, type and bytes. Arrays are views of the file's bytes, so a file cannot ask for
more memory than it has bytes.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

# A ResNet-50 takes 30,000 steps. Every step can leave an object behind.
_MAX_STEPS = 1_000_000
# Names, keys and type codes are short; contents of arrays are not text.
_MAX_TEXT = 1000
_MAX_DIMENSIONS = 32
_NUMBERS = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})


class ForeignObjectError(ValueError):
    """The pickle names something that no file of arrays needs; the message is that name."""


@dataclasses.dataclass
class PickledArray:
    """Stands for an array; `value` is None until the pickle says what is in it."""

    value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Name:
    """What an import in the pickle becomes."""

    module: str
    name: str


@dataclasses.dataclass
class _Type:
    """A NumPy type: code as in `f4`, and byte order."""

    code: str
    order: str = "="


@dataclasses.dataclass(frozen=True)
class _LongText:
    """Text too long for a name: bytes of an array, as protocol 2 writes them."""

    utf8: memoryview


def load_pickled(data: bytes) -> Any:
    """What the pickle holds, with a `PickledArray` for every array; protocols 2 to 5.

    Raises:
      ForeignObjectError: it names a class or function that arrays do not need.
      ValueError: it is damaged, or holds anything but dictionaries, lists, tuples, numbers, text
        and numeric arrays.
    """
    return _Machine(data).run()


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, data: bytes):
        self.data = memoryview(data)
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # What is copied, in bytes: a program could ask for the same copy again and again.
        self.copies_left = 2 * len(data)

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            opcode = bytes(self.take(1))
            if opcode == pickle.STOP:
                return self.pop()
            if opcode not in _STEPS:
                raise ValueError(f"unexpected instruction {opcode!r} at byte {self.at - 1}")
            _STEPS[opcode](self)
        raise ValueError(f"more than {_MAX_STEPS} instructions")

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"ends at byte {len(self.data)}, {size} more expected at {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        if size > 8:
            raise ValueError(f"an integer of {size} bytes at byte {self.at}")
        return int.from_bytes(self.take(size), "little", signed=True)

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + _MAX_TEXT]).find(b"\n")
        if end < 0:
            raise ValueError(f"no end of the line at byte {self.at}")
        return str(self.take(end + 1)[:end], "ascii")

    def spend(self, size: int) -> None:
        self.copies_left -= size
        if self.copies_left < 0:
            raise ValueError("asks for more copies than the file has bytes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_text(self, size: int) -> None:
        view = self.take(size)
        self.push(str(view, "utf-8") if size <= _MAX_TEXT else _LongText(view))

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError(f"nothing on the stack at byte {self.at}")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError(f"no mark on the stack at byte {self.at}")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def remember(self, slot: int) -> None:
        self.memo[slot] = self.top()

    def recall(self, slot: int) -> None:
        if slot not in self.memo:
            raise ValueError(f"nothing remembered as {slot} at byte {self.at}")
        self.push(self.memo[slot])

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise ValueError(f"items appended to {_kind(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"{len(items)} keys and values put into {_kind(target)}")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def push_name(self, module: str, name: str) -> None:
        if (module, name) not in _CALLS:
            raise ForeignObjectError(f"{module}.{name}"[:120])
        self.push(_Name(module, name))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Name):
            raise ValueError(f"a call of {_kind(function)} with {_kind(arguments)}")
        if len(arguments) not in _ARGUMENTS[function.name]:
            raise ValueError(f"a call of {function.name} with {len(arguments)} arguments")
        self.push(_CALLS[function.module, function.name](self, *arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, _Type):
            target.order = _order(state)
        elif isinstance(target, PickledArray):
            if target.value is not None or not isinstance(state, tuple) or len(state) != 5:
                raise ValueError(f"an array of {_kind(state)}")
            _, shape, dtype, is_fortran, content = state
            order = "F" if is_fortran is True else "C"
            target.value = self.array(dtype, shape, order, content)
        elif not isinstance(target, dict):  # PyTorch's dictionaries carry metadata: not needed
            raise ValueError(f"a state for {_kind(target)}")

    def encoded(self, text: Any, encoding: Any) -> bytes:
        """The bytes that protocol 2 writes as text."""
        if _text(encoding) not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in the encoding {_text(encoding)[:20]!r}, expected 'latin1'")
        content = text.utf8 if isinstance(text, _LongText) else _text(text).encode()
        self.spend(len(content))
        return str(content, "utf-8").encode("latin-1")

    def dictionary(self, *pairs: Any) -> dict[str | int, Any]:
        """An OrderedDict; Python 2 hands it its pairs as lists."""
        (items,) = pairs or ([],)
        if not isinstance(items, list) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 for pair in items
        ):
            raise ValueError(f"a dictionary of {_kind(items)}")
        self.spend(len(items))
        return {_key(key): value for key, value in items}

    def array(self, dtype: Any, shape: Any, order: Any, content: Any) -> np.ndarray:
        """The array, in the machine's byte order; a view where the file has that order."""
        if not isinstance(dtype, _Type) or not isinstance(content, memoryview | bytes):
            raise ValueError(f"an array of {_kind(dtype)} and {_kind(content)}, expected numbers")
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS or order not in ("C", "F"):
            raise ValueError(f"an array whose shape is {_kind(shape)}")
        if any(type(size) is not int or not 0 <= size < 2**40 for size in shape):
            raise ValueError("an array whose shape is no list of sizes")
        stored = np.dtype(f"{dtype.order}{dtype.code}")
        if math.prod(shape) * stored.itemsize != len(content):
            raise ValueError(f"an array of shape {shape} with {len(content)} bytes"[:200])
        array = np.frombuffer(content, stored) if len(content) else np.zeros(0, stored)
        if not stored.isnative:
            self.spend(len(content))
            array = array.astype(stored.newbyteorder("="))
        return array.reshape(shape, order=order)


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_")


def _text(value: Any) -> str:
    """A name; Python 2 has it as bytes."""
    if isinstance(value, memoryview | bytes) and len(value) <= _MAX_TEXT:
        return str(value, "latin-1")
    if not isinstance(value, str):
        raise ValueError(f"found {_kind(value)}, expected a name")
    return value


def _key(value: Any) -> str | int:
    """A key; tuples are none, as hashing a nested one can take for ever."""
    return value if type(value) is int else _text(value)


def _type(_: _Machine, code: Any, *flags: Any) -> _Type:
    name = _text(code)
    if name not in _NUMBERS:
        raise ValueError(f"found an array of type {name[:20]!r}, expected numbers")
    return _Type(name)


def _order(state: Any) -> str:
    """The byte order, of a state that describes neither fields nor anything else."""
    if not isinstance(state, tuple) or len(state) != 8:
        raise ValueError(f"a type of {_kind(state)}")
    order = _text(state[1])
    if order not in ("<", ">", "=", "|") or any(item is not None for item in state[2:5]):
        raise ValueError(f"a type of byte order {order[:20]!r} and with fields, expected numbers")
    return order


# What `numpy.ndarray.__reduce__` and friends name, in NumPy 1 and 2, and what it does here.
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): PickledArray,  # only named, as an argument
    ("numpy", "dtype"): _type,
    ("collections", "OrderedDict"): _Machine.dictionary,
    ("_codecs", "encode"): _Machine.encoded,
    ("__builtin__", "bytes"): lambda _: b"",
}
for _core in ("core", "_core"):
    _CALLS[f"numpy.{_core}.multiarray", "_reconstruct"] = lambda *_: PickledArray()
    _CALLS[f"numpy.{_core}.multiarray", "scalar"] = lambda machine, dtype, content: PickledArray(
        machine.array(dtype, (), "C", content)
    )
    _CALLS[f"numpy.{_core}.numeric", "_frombuffer"] = lambda machine, content, *about: PickledArray(
        machine.array(*about, content)
    )
_ARGUMENTS = {
    "ndarray": (),
    "dtype": (3,),
    "OrderedDict": (0, 1),
    "encode": (2,),
    "bytes": (0,),
    "_reconstruct": (3,),
    "scalar": (2,),
    "_frombuffer": (4,),
}


def _stack_name(machine: _Machine) -> None:
    name, module = _text(machine.pop()), _text(machine.pop())
    machine.push_name(module, name)


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda machine: machine.take(1),
    pickle.FRAME: lambda machine: machine.take(8),
    pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: _Machine.pop_to_mark,
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT: lambda machine: machine.push(machine.signed(4)),
    pickle.BININT1: lambda machine: machine.push(machine.unsigned(1)),
    pickle.BININT2: lambda machine: machine.push(machine.unsigned(2)),
    pickle.LONG1: lambda machine: machine.push(machine.signed(machine.unsigned(1))),
    pickle.BINFLOAT: lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    pickle.BINSTRING: lambda machine: machine.push(machine.take(machine.unsigned(4))),
    pickle.SHORT_BINSTRING: lambda machine: machine.push(machine.take(machine.unsigned(1))),
    pickle.BINUNICODE: lambda machine: machine.push_text(machine.unsigned(4)),
    pickle.SHORT_BINUNICODE: lambda machine: machine.push_text(machine.unsigned(1)),
    pickle.BINUNICODE8: lambda machine: machine.push_text(machine.unsigned(8)),
    pickle.BINBYTES: lambda machine: machine.push(machine.take(machine.unsigned(4))),
    pickle.SHORT_BINBYTES: lambda machine: machine.push(machine.take(machine.unsigned(1))),
    pickle.BINBYTES8: lambda machine: machine.push(machine.take(machine.unsigned(8))),
    pickle.BYTEARRAY8: lambda machine: machine.push(machine.take(machine.unsigned(8))),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.APPEND: lambda machine: machine.append([machine.pop()]),
    pickle.APPENDS: lambda machine: machine.append(machine.pop_to_mark()),
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_to_mark())),
    pickle.TUPLE1: lambda machine: machine.push_tuple(1),
    pickle.TUPLE2: lambda machine: machine.push_tuple(2),
    pickle.TUPLE3: lambda machine: machine.push_tuple(3),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.SETITEM: lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.pop_to_mark()),
    pickle.GLOBAL: lambda machine: machine.push_name(machine.line(), machine.line()),
    pickle.STACK_GLOBAL: _stack_name,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPUT: lambda machine: machine.remember(machine.unsigned(1)),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.unsigned(4)),
    pickle.MEMOIZE: lambda machine: machine.remember(len(machine.memo)),
    pickle.BINGET: lambda machine: machine.recall(machine.unsigned(1)),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.unsigned(4)),
}
