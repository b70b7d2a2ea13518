"""The readers of weights and detections that are fuzzed."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from alignps_jax.evaluation.detections_io import check_detections, load_detections, save_detections
from alignps_jax.types import GalleryDetections
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


def _npz(folder: Path) -> Sequence[Path]:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((9, 6))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    corner = rng.random((9, 2)) * 100
    detections = GalleryDetections(
        names=("a.jpg", "é.jpg", "b.jpg"),
        offsets=np.array([0, 4, 4, 9]),
        boxes=np.hstack([corner, corner + 5]).astype(np.float32),
        scores=np.sort(rng.random(9))[::-1].astype(np.float32),
        embeddings=embeddings.astype(np.float32),
    )
    save_detections(folder / "a.npz", detections)
    with np.load(folder / "a.npz") as arrays:
        np.savez_compressed(folder / "b.npz", **arrays)
    return sorted(folder.iterdir())


def check_tensors(tensors: Tensors) -> None:
    for name, array in tensors.items():
        assert isinstance(name, str), "a name that is no text"
        assert array.dtype.kind in "fiu", "a tensor of no numbers"
        assert array.dtype.isnative, "a tensor of another byte order"
        assert np.isfinite(array).all(), "a number that is not finite"


def _check_detections(detections: GalleryDetections) -> None:
    check_detections(detections, "what was read")
    lengths = np.linalg.norm(detections.embeddings.astype(np.float64), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5), "an embedding of another length"


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


def damage_npz(rng: random.Random, data: bytes) -> bytes:
    """Changes of one array behind the checksums of the archive, or of any byte of it."""
    if rng.random() < 0.3:
        return damage(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(members))
    content = members[chosen]
    end = content.index(b"\n") + 1
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: damage(rng, content),
        lambda: damage(rng, content[:end]) + content[end:],
        lambda: content[:end] + damage(rng, content[end:]),
        lambda: content.replace(*rng.choice(_HEADER_CHANGES)),
    )
    members[chosen] = rng.choice(changes)()
    target = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(target, "w", packing) as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return target.getvalue()


_HEADER_CHANGES = (
    *((b"<f4", b"|O8"), (b"<f4", b">f4"), (b"<f4", b"<i4"), (b"<f4", b"<M8"), (b"<i8", b"<u8")),
    *((b"(9,", b"(99999999999,"), (b"(9, 4)", b"(0, 0)"), (b"False", b"True"), (b"<U", b">U")),
    *((b"(9,", b"(-9,"), (b"(9, 6)", b"(6, 9)"), (b"<f4", b"<U1"), (b"(3,)", b"(3,1,1)")),
)

TENSOR_READERS: dict[str, Reader] = {
    "safetensors": Reader(
        build=_safetensors,
        read=lambda _, path: read_tensors(path),
        check=check_tensors,
        damage=damage_safetensors,
    ),
    "npz": Reader(
        build=_npz,
        read=lambda _, path: load_detections(path),
        check=_check_detections,
        damage=damage_npz,
    ),
}
