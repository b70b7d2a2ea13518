"""Files of tensors: what others write is read, what is damaged or crafted is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from alignps_jax.types import UserError
from alignps_jax.weights.tensor_files import read_tensors, write_tensors
from tests.data_pipeline.sources.damaged_test import damage

TENSORS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(7),
    "half": np.ones(3, np.float16),
    "empty": np.zeros((0, 2), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
}


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def crafted(folder: Path, header: dict | bytes, body: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "crafted.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "new folder" / "a.safetensors"
    write_tensors(path, TENSORS, {"who": "test"})
    assert_same(read_tensors(path), TENSORS)
    assert_same(safetensors.numpy.load_file(path), TENSORS)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "who": "test"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


BAD_HEADERS = {
    "more than the file holds": ({"a": entry("F32", [2], 0, 8)}, b"1234"),
    "terabytes": ({"a": entry("F32", [2**40], 0, 2**42)}, b"1234"),
    "beyond 64 bits": ({"a": entry("F32", [2**62, 2**62], 0, 4)}, b"1234"),
    "below zero": ({"a": entry("F32", [-1], 0, 4)}, b"1234"),
    "no dimension": ({"a": entry("F32", [], 0, 8)}, b"12345678"),
    "a gap": ({"a": entry("F32", [1], 4, 8)}, b"12345678"),
    "two in one place": (
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)},
        b"1234",
    ),
    "bytes left over": ({"a": entry("F32", [1], 0, 4)}, b"12345678"),
    "seventy dimensions": ({"a": entry("F32", [1] * 70, 0, 4)}, b"1234"),
    "an unknown type": ({"a": entry("F33", [1], 0, 4)}, b"1234"),
    "bfloat16": ({"a": entry("BF16", [2], 0, 4)}, b"1234"),
    "float8": ({"a": entry("F8_E4M3", [4], 0, 4)}, b"1234"),
    "truth values": ({"a": entry("BOOL", [4], 0, 4)}, b"\0\1\2\3"),
    "infinity": ({"a": entry("F32", [1], 0, 4)}, b"\0\0\x80\x7f"),
    "no number": ({"a": entry("F16", [1], 0, 2)}, b"\xff\xff"),
    "a name of two lines": ({"a\nb": entry("F64", [1], 0, 8)}, b"\xff" * 8),
    "a long name": ({"a" * 99_999: entry("F64", [1], 0, 8)}, b"\xff" * 8),
    "no entries": ({"a": 3}, b""),
    "a list": (b'{"a": [1, 2, 3', b""),
    "a deep list": (b'{"a":' + b"[" * 100_000, b""),
    "no text": (b'{"\xff\xfe": 1}', b""),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(case, tmp_path):
    path = crafted(tmp_path, *BAD_HEADERS[case])
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        read_tensors(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(path)) + 250


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_headers_of_a_wrong_length_are_refused(length, tmp_path):
    path = crafted(tmp_path, {"a": entry("F32", [1], 0, 4)}, b"1234", length)
    with pytest.raises(UserError, match="damaged or cut off"):
        read_tensors(path)


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("folder.pth", "pipe.pth"):
        with pytest.raises(UserError, match=f"{name}: found a folder or a device, expected a file"):
            read_tensors(tmp_path / name)
    with pytest.raises(UserError, match=r"nowhere.pth: cannot be read \(No such file"):
        read_tensors(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "a\0b")


def test_files_that_cannot_be_written_are_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: found a file, expected a folder for a.safet"):
        write_tensors(tmp_path / "file" / "a.safetensors", TENSORS, {})
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"folder.safetensors: "):
        write_tensors(tmp_path / "folder.safetensors", TENSORS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize("version", ["1.13.1", "2.4.0", "2.9.1+cu128", "2.9.0a0+git123"])
def test_an_old_pytorch_is_refused_by_name(version, tmp_path, monkeypatch):
    """Its loader has holes, so it is not even called."""
    old = types.ModuleType("torch")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "torch", old)
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    expected = rf"a.pth: found PyTorch {re.escape(version)}, expected 2.10 or newer: .*torch>=2.10"
    with pytest.raises(UserError, match=expected):
        read_tensors(tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"b.pth: found PyTorch {re.escape(version)}"):
        write_tensors(tmp_path / "b.pth", TENSORS, {})


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_pth_archives_that_unpack_to_more_are_refused(tmp_path):
    import zipfile

    write_tensors(tmp_path / "a.pth", {"a": np.zeros(100_000, np.float32)}, {})
    with zipfile.ZipFile(tmp_path / "a.pth") as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    with pytest.raises(UserError, match=r"b.pth: damaged or cut off .* bytes in a file of"):
        read_tensors(tmp_path / "b.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pth_files_are_refused(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(value)) for name, value in TENSORS.items()}
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    sound = path.read_bytes()
    assert_same(read_tensors(path), TENSORS)
    for number in range(300):
        path.write_bytes(damage(random.Random(number), sound))
        with contextlib.suppress(UserError):  # anything else fails the test
            found = read_tensors(path)
            assert all(np.isfinite(value).all() for value in found.values())
