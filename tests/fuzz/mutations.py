"""Ways to damage a file: bytes of any kind, and formats taken apart and put together again.

A mutation takes a random generator and the content of a file, and returns another content. The
ones that know a format repair its checksums and sizes now and then: what gets past these reaches
the code behind them.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_INTEGERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31)
_INTEGERS += (2**32 - 8, 2**32 - 1, -1, -2, -(2**31), 2**63 - 1, 2**64 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-300, 2.0**24 + 1, -0.0, 0.5)
_NAMES = ("../x.jpg", "/etc/passwd", "a\0b", "", ".", "..", "\x1b[2J", "a\nb", "x" * 5000, "é√字𝄞")
_MANY = 100_000


def damage(rng: random.Random, data: bytes) -> bytes:
    """A few changes of single bytes, numbers and ranges, or a cut."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data = rng.choice(_CHANGES)(rng, data)
    return data


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Changes of values anywhere in a JSON file, or of its text."""
    if rng.random() < 0.25:
        return damage(rng, data)
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = _changed_value(rng, content)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def damage_text(rng: random.Random, data: bytes) -> bytes:
    """Changes of words in lines, or of bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        number = rng.randrange(len(lines))
        words = lines[number].split(b" ")
        word = rng.choice((str(rng.choice(_INTEGERS + _FLOATS)), rng.choice(_NAMES), "9" * 5000))
        change = rng.randrange(3)
        at = rng.randrange(len(words))
        if change == 0:
            words[at] = word.encode()
        elif change == 1:
            words.insert(at, word.encode())
        else:
            del words[at]
        lines[number] = b" ".join(words)
    return b"\n".join(lines)


def damage_image(rng: random.Random, data: bytes) -> bytes:
    """Changes of a photo, most of them in its headers; a PNG's checksums are often repaired."""
    head, rest = data[:600], data[600:]
    data = damage(rng, head) + rest if rng.random() < 0.6 else damage(rng, data)
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        return _with_checksums(data)
    return data


def _with_checksums(png: bytes) -> bytes:
    parts, position = [png[:8]], 8
    while position + 12 <= len(png):
        (size,) = struct.unpack_from(">I", png, position)
        chunk = png[position + 4 : position + 8 + size]
        parts.append(png[position : position + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)))
        position += 12 + size
    return b"".join(parts) + png[position:]


def _flip(rng: random.Random, data: bytes) -> bytes:
    return _put(data, rng, bytes([rng.randrange(256)]))


def _number(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_INTEGERS) % 256**size
    return _put(data, rng, value.to_bytes(size, rng.choice(("little", "big"))))


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(rng: random.Random, data: bytes) -> bytes:
    begin, end = _range(rng, data)
    return data[:begin] + data[end:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    begin, end = _range(rng, data)
    return data[:end] + data[begin:end] * rng.choice((1, 1, 2, 9)) + data[end:]


def _noise(rng: random.Random, data: bytes) -> bytes:
    begin, end = _range(rng, data)
    return data[:begin] + rng.randbytes(end - begin) + data[end:]


def _move(rng: random.Random, data: bytes) -> bytes:
    begin, end = _range(rng, data)
    return _put(data, rng, data[begin:end])


_CHANGES: tuple[Mutation, ...] = (_flip, _flip, _number, _number, _cut, _remove, _repeat)
_CHANGES += (_noise, _move)


def _put(data: bytes, rng: random.Random, part: bytes, align: int = 1) -> bytes:
    at = rng.randrange(len(data) + 1) // align * align
    return data[:at] + part + data[at + len(part) :]


def _range(rng: random.Random, data: bytes) -> tuple[int, int]:
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.choice((1, 4, 8, 16, 64, 256, 1024)))


def _changed_value(rng: random.Random, value: Any) -> Any:
    """A copy with a change at a random place below `value`."""
    inside = isinstance(value, dict | list) and len(value) > 0
    if not inside or rng.random() < 0.1:
        return _other_value(rng, value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, change = rng.choice(keys), rng.random()
    copy = value.copy()
    if change < 0.8:
        copy[key] = _changed_value(rng, value[key])
    elif change < 0.9:
        del copy[key]
    elif isinstance(copy, list):
        copy.append(value[key])
    else:
        copy[key] = rng.choice(list(value.values()))
    return copy


def _other_value(rng: random.Random, value: Any) -> Any:
    deep: Any = 0
    for _ in range(rng.choice((3, 60, 400))):
        deep = [deep]
    numbers = (rng.choice(_INTEGERS), rng.choice(_FLOATS), 10**400, -(10**400), rng.random())
    others = (None, True, False, [], {}, deep, [value, value], {"a": value}, "\ud800")
    return rng.choice((*numbers, *others, rng.choice(_NAMES), str(value)[:_MANY]))
