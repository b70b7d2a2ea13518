"""Archives of arrays that promise more than they hold, or hold what is no array of numbers."""

from __future__ import annotations

import contextlib
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.npz_files import Field, read_npz
from alignps_jax.types import UserError

FIELDS = {"a": Field(2, "fiu", "[N, 3] numbers")}
HEADER = "{'descr': %s, 'fortran_order': False, 'shape': %s}"


def member(descr: str, shape: str, body: bytes = b"", version: bytes = b"\x01\0") -> bytes:
    header = (HEADER % (descr, shape)).encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + body


def archive(path: Path, content: bytes, name: str = "a.npy", packing: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packing) as target:
        target.writestr(name, content)
    return path


@pytest.mark.parametrize("value", [np.ones((2, 3)), np.asfortranarray(np.eye(3, dtype=">f4"))])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(value, save, tmp_path):
    save(tmp_path / "a.npz", a=value, other=np.array([{}], object))
    found = read_npz(tmp_path / "a.npz", FIELDS)["a"]
    np.testing.assert_array_equal(found, value)
    assert found.dtype == value.dtype.newbyteorder("=")


CRAFTED = {
    "terabytes": member("'<f4'", f"({2**40}, 3)"),
    "beyond 64 bits": member("'<f4'", f"({2**62}, {2**62})"),
    "overflow to what is there": member("'<f4'", f"({2**62}, 4)"),
    "terabytes of nothing": member("'<f4'", f"(0, {2**62})"),
    "below zero": member("'<f4'", "(-1, -3)", b"a" * 12),
    "true": member("'<f4'", "(True, 3)", b"a" * 11),
    "text": member("'<f4'", "('a', 3)"),
    "more": member("'<f4'", "(1, 3)", b"a" * 13),
    "less": member("'<f4'", "(1, 3)", b"a" * 11),
    "objects": member("'|O'", "(1, 3)", pickle.dumps([1, 2, 3])),
    "fields": member("[('a', '<f4')]", "(1, 3)", b"a" * 12),
    "a text type of gigabytes": member("'<U999999999'", "(1, 3)", b"a" * 12),
    "void": member("'|V4'", "(1, 3)", b"a" * 12),
    "a date": member("'<M8[s]'", "(1, 3)", b"a" * 24),
    "a complex number": member("'<c8'", "(1, 3)", b"a" * 24),
    "no width": member("'<U0'", f"({2**40}, {2**40})"),
    "another version": member("'<f4'", "(1, 3)", b"a" * 12, b"\x03\0"),
    "an expression": member("__import__('os').getcwd()", "(1, 3)"),
    "brackets": member("(" * 5000, "1"),
    "no header": b"\x93NUMPY\x01\0\xff\xff",
    "no array": b"hello",
    "nothing": b"",
}


@contextlib.contextmanager
def memory_below(limit: float):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_headers_are_refused(case, tmp_path):
    path = archive(tmp_path / "a.npz", CRAFTED[case])
    message = r"a.npz: array 'a' (cannot be read|is .* expected)"
    with memory_below(20e6), pytest.raises(UserError, match=message) as e:
        read_npz(path, FIELDS)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < len(str(path)) + 300


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    body = bytes(60_000_000)
    content = member("'<f4'", "(5000000, 3)", body)
    path = archive(tmp_path / "a.npz", content, packing=zipfile.ZIP_DEFLATED)
    message = r"a.npz: found arrays of 600000.. bytes in a file of"
    with memory_below(5e6), pytest.raises(UserError, match=message):
        read_npz(path, FIELDS)
    # The archive can understate it; the checksum and the header cannot agree then.
    data = path.read_bytes()
    size = len(content).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"a.npz: array 'a' cannot be read"):
        read_npz(path, FIELDS)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_without_a_bound_are_refused(packing, tmp_path):
    path = archive(tmp_path / "a.npz", member("'<f4'", "(1, 3)", b"a" * 12), packing=packing)
    with pytest.raises(UserError, match=r"cannot be read .*packed in the way"):
        read_npz(path, FIELDS)


def test_arrays_that_are_missing_or_twice_are_named(tmp_path):
    path = archive(tmp_path / "a.npz", b"", "b\n.npy")
    with pytest.raises(UserError, match=r"'a' is missing \(found 'b\\n'\); expected \[N, 3]"):
        read_npz(path, FIELDS)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            target.writestr("a.npy", b"")
    with pytest.raises(UserError, match="array 'a' is there twice"):
        read_npz(path, FIELDS)


def test_honest_arrays_take_little_more_memory_than_they_need(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones((1_000_000, 3), np.float32))
    with memory_below(2.1 * 12e6):
        read_npz(tmp_path / "a.npz", FIELDS)
