"""The readers of weights that are fuzzed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors
from tests.fuzz.mutations import damage, damage_json
from tests.fuzz.runner import Reader


def some_tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "bn1.num_batches_tracked": np.array(5),
        "half": np.ones((2, 0), np.float16),
        "double": np.asfortranarray(rng.standard_normal((2, 5))),
    }


def _safetensors(folder: Path) -> Sequence[Path]:
    write_tensors(folder / "a.safetensors", some_tensors(), {"by": "test"})
    return [folder / "a.safetensors"]


def _pickles(folder: Path) -> Sequence[Path]:
    content = {
        "model": some_tensors() | {"big": np.ones(3, ">f4")},
        "__author__": "é",
        "n": [1, 0.5],
    }
    for protocol in (2, 3, 4, 5):
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    return sorted(folder.iterdir())


def check_tensors(tensors: Tensors) -> None:
    for name, array in tensors.items():
        assert isinstance(name, str), "a name that is no text"
        assert array.dtype.kind in "fiu", "a tensor of no numbers"
        assert array.dtype.isnative, "a tensor of another byte order"
        assert np.isfinite(array).all(), "a number that is not finite"


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Changes of the header's text, its length corrected now and then, or of any byte."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return damage(rng, data)
    header = rng.choice((damage, damage_json))(rng, data[8:end].rstrip())
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63, 2**64 - 1))
    body = data[end:] if rng.random() < 0.9 else damage(rng, data[end:])
    return length.to_bytes(8, "little") + header + body


def damage_pickle(rng: random.Random, data: bytes) -> bytes:
    """Single instructions exchanged, doubled and left out, or bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(2, len(data))
        part = rng.choice((bytes([rng.choice(_OPCODES)]), rng.choice(_PROGRAMS)))
        data = data[:at] + part + data[at + rng.choice((0, 1, len(part))) :]
    return data


_OPCODES = b"".join(
    value for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes)
)
_PROGRAMS = (
    *(b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cos\nsystem\n", b"U\x02O8", b"K\xff\x85"),
    *(b"h\0h\0\x86q\0", b"(K\x03U\x01|NNNK\x08K\x01K?tb", b")R", b"}b", b"\x93", b"\x81"),
    *(b"j\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"T\xff\xff\xff\x7f", b"\x8a\x09" + b"9" * 9),
)


TENSOR_READERS: dict[str, Reader] = {
    "safetensors": Reader(
        build=_safetensors,
        read=lambda _, path: read_tensors(path),
        check=check_tensors,
        damage=damage_safetensors,
    ),
    "pickles": Reader(
        build=_pickles,
        read=lambda _, path: read_tensors(path),
        check=check_tensors,
        damage=damage_pickle,
    ),
}
