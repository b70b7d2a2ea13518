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


def damage_mat(rng: random.Random, data: bytes) -> bytes:
    """Changes of a MATLAB file, most of them behind the compression."""
    if rng.random() < 0.2 or data[126:128] == b"MI":
        return data[:128] + rng.choice((damage, _word, _words))(rng, data[128:])
    elements, position = [], 128
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, position)
        body = data[position + 8 : position + 8 + size]
        if kind == 15:
            body = zlib.decompress(body)[8:]
        elements.append(body)
        position += 8 + size
    chosen = rng.randrange(len(elements)) if elements else 0
    parts = []
    for number, body in enumerate(elements):
        changed = body
        if number == chosen:
            for _ in range(rng.choice((1, 1, 2, 5))):
                changed = rng.choice(_MAT_CHANGES)(rng, changed)
        promised = rng.choice(_INTEGERS) % 2**32 if rng.random() < 0.05 else len(changed)
        element = struct.pack("<II", 14, promised) + changed
        if rng.random() < 0.5:
            packed = zlib.compress(element, 1)
            element = struct.pack("<II", 15, len(packed)) + packed
        parts.append(element)
    return data[:128] + b"".join(parts)


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


def _word(rng: random.Random, data: bytes) -> bytes:
    """A number where tags, sizes, flags and lengths are."""
    return _put(data, rng, struct.pack("<I", rng.choice(_INTEGERS) % 2**32), align=4)


def _small_word(rng: random.Random, data: bytes) -> bytes:
    return _put(data, rng, struct.pack("<I", rng.randrange(20)), align=4)


def _float(rng: random.Random, data: bytes) -> bytes:
    return _put(data, rng, struct.pack("<d", rng.choice(_FLOATS)), align=8)


def _name(rng: random.Random, data: bytes) -> bytes:
    return _put(data, rng, rng.choice(_NAMES).encode()[:16], align=8)


def _words(rng: random.Random, data: bytes) -> bytes:
    """Eight-byte words out, in, or in another place; so most sizes stay multiples of eight."""
    begin, end = (8 * (place // 8) for place in _range(rng, data))
    part = data[begin:end]
    return rng.choice(
        (data[:begin] + data[end:], data[:end] + part + data[end:], _put(data, rng, part, align=8))
    )


_MAT_CHANGES: tuple[Mutation, ...] = (_word, _word, _small_word, _float, _name, _words, damage)


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
