"""MATLAB files against SciPy's reading of the same ones, and files that are damaged or crafted."""

import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.io

from data_pipeline.sources import mat_stream
from data_pipeline.sources.mat_structs import (
    Structs,
    cells,
    class_of,
    matrix,
    numbers,
    read_structs,
    read_variable,
    text,
)
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import SHARED

ENTRIES = [
    {"name": "s1.jpg", "where": np.array([[1, 2, 300, 4]], np.uint16), "none": np.zeros((1, 0))},
    {"name": "sé.jpg", "where": np.array([[-1.5, 2, 3, 4]]), "none": np.zeros((0, 0))},
    {"name": "x", "where": np.array([[7]], np.int8), "none": np.zeros((1, 0))},
    {"name": "", "where": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros((1, 0))},
]
NUMERIC = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?")
REAL_FILES = sorted(SHARED.rglob("*.mat"))


def write(path, variable=None, *, compressed=True, count=3):
    outer = [
        {"Few": fixtures.structs(ENTRIES[:1]), "Gallery": fixtures.structs(ENTRIES[:n])}
        for n in range(count + 1)
    ]
    variables = {"other": np.arange(9), "wanted": fixtures.structs(outer)} if not variable else {}
    scipy.io.savemat(path, variables or variable, do_compression=compressed)


def ours(body):
    """All of a value as lists, dicts, strings and rows of numbers."""
    kind = class_of(body)
    if kind == "struct":
        array = Structs.of(body)
        return [dict(zip(array.fields, map(ours, row), strict=True)) for row in array]
    if kind == "cell":
        return [ours(cell) for cell in cells(body)]
    return text(body) if kind == "char" else numbers(body)


def theirs(array):
    """The same of what SciPy reads."""
    if array.dtype.names:
        rows = array.ravel(order="F")
        return [{name: theirs(row[name]) for name in array.dtype.names} for row in rows]
    if array.dtype == object:
        return [theirs(cell) for cell in array.ravel(order="F")]
    return "".join(array) if array.dtype.kind == "U" else array.ravel(order="F")


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        assert_same(list(left.values()), list(right.values()))
    elif isinstance(left, str):
        assert left == right
    else:
        assert left.dtype.newbyteorder("=") == right.dtype.newbyteorder("=")
        assert np.array_equal(left, right)


def random_value(rng, depth):
    kind = rng.integers(4 if depth else 2)
    if kind == 0:
        shape = tuple(rng.integers(0, 4, rng.integers(2, 5)))
        return rng.integers(0, 100, shape).astype(NUMERIC[rng.integers(len(NUMERIC))])
    if kind == 1:
        return "".join(rng.choice(list("ab é√字"), rng.integers(0, 12)))
    count = int(rng.integers(0, 4))
    if kind == 2:
        return fixtures.cells([random_value(rng, depth - 1) for _ in range(count)])
    fields = ["a", "bb", "longer_name"][: rng.integers(1, 4)]
    return fixtures.structs(
        [{field: random_value(rng, depth - 1) for field in fields} for _ in range(count)]
    )


@pytest.mark.parametrize("compressed", [True, False])
def test_entries_are_those_that_scipy_reads(tmp_path, compressed):
    path = tmp_path / "a.mat"
    write(path, compressed=compressed, count=4)
    rows = [
        {field: ours(body) for field, body in row.items()} for row in read_structs(path, "wanted")
    ]
    assert len(rows) == 5
    assert_same(rows, theirs(scipy.io.loadmat(path)["wanted"]))


@pytest.mark.parametrize("seed", range(40))
def test_random_values_are_those_that_scipy_reads(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.mat"
    variables = {name: random_value(rng, 3) for name in ("a", "b", "c")}
    scipy.io.savemat(path, variables, do_compression=bool(seed % 2), long_field_names=seed % 3 > 0)
    expected = scipy.io.loadmat(path)
    files = [path]
    if not seed % 2:
        files.append(tmp_path / "big.mat")
        files[1].write_bytes(fixtures.big_endian(path.read_bytes()))
        assert_same(theirs(scipy.io.loadmat(files[1])["a"]), theirs(expected["a"]))
    for file in files:
        for name in variables:
            assert_same(ours(read_variable(file, ["absent", name])), theirs(expected[name]))


@pytest.mark.skipif(not REAL_FILES, reason="no real file is here")
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.name)
def test_real_files_are_those_that_scipy_reads(path):
    for name, expected in scipy.io.loadmat(path).items():
        if name == "TestG100":  # 870,000 values: every twentieth entry
            rows = list(itertools.islice(read_structs(path, name), 0, None, 20))
            assert len(rows) == 145
            rows = [{field: ours(value) for field, value in row.items()} for row in rows]
            assert_same(rows, theirs(expected.ravel()[::20]))
        elif not name.startswith("__"):
            assert_same(ours(read_variable(path, [name])), theirs(expected))


def test_a_matrix_keeps_its_shape(tmp_path):
    path = tmp_path / "a.mat"
    rows = np.arange(15.0).reshape(3, 5)
    write(path, {"flat": rows, "deep": np.zeros((2, 3, 4)), "none": np.zeros((0, 5))})
    np.testing.assert_array_equal(matrix(read_variable(path, ["flat"])), rows)
    assert matrix(read_variable(path, ["none"])).shape == (0, 5)
    assert matrix(b"").shape == (0, 0)
    with pytest.raises(ValueError, match="3 dimensions, not two"):
        matrix(read_variable(path, ["deep"]))


def test_a_damaged_or_other_file_is_an_error(tmp_path):
    path = tmp_path / "a.mat"
    write(path)
    whole = path.read_bytes()
    for data, message in (
        (whole[:-40], "ends too early"),
        (whole[:150], "ends too early"),
        (whole[:132], "ends too early"),
        (b"", "no MATLAB file"),
        (b"MATLAB, honestly", "no MATLAB file"),
        (whole[:126] + b"MI" + whole[128:], "no MATLAB file"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged .*incorrect data check"),
        (whole[:124] + b"\x00\x02IM" + whole[128:], r"version 7.3 .*save\(\.\.\., '-v7'\)"),
        (b"\x89HDF\r\n\x1a\n" + whole, "version 7.3"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            list(read_structs(path, "wanted"))
        with pytest.raises(ValueError, match=message):
            read_variable(path, ["wanted"])


def test_what_is_not_there_or_of_another_class_is_an_error(tmp_path):
    path = tmp_path / "a.mat"
    write(path)
    with pytest.raises(ValueError, match="holds the variables other, wanted"):
        list(read_structs(path, "absent"))
    with pytest.raises(ValueError, match="holds the variables other, wanted"):
        read_variable(path, ["absent"])
    with pytest.raises(ValueError, match="class int64, not struct"):
        list(read_structs(path, "other"))
    for row in read_structs(path, "wanted"):
        with pytest.raises(ValueError, match="class struct, not of real numbers"):
            numbers(row["Few"])
    write(
        path,
        {
            "cells": fixtures.cells(["a", "b"]),
            "complex": np.array([1j]),
            "lines": np.array(["ab", "cd"]),
            "numbers": np.arange(3),
            "sparse": scipy.sparse.eye(3),
            "structs": fixtures.structs(ENTRIES),
        },
    )
    for read, name, message in (
        (Structs.of, "numbers", "class int64, not struct"),
        (Structs.of, "cells", "class cell, not struct"),
        (cells, "structs", "class struct, not cell"),
        (text, "numbers", "class int64, not char"),
        (text, "lines", "4 characters in an array of 2x2, not one row"),
        (numbers, "lines", "class char, not of real numbers"),
        (numbers, "sparse", "class sparse, not of real numbers"),
        (numbers, "complex", "complex numbers, not of real"),
    ):
        body = read_variable(path, [name])
        with pytest.raises(ValueError, match=message):
            list(read(body))
    with pytest.raises(ValueError, match="found 4 structs where one should be"):
        Structs.of(read_variable(path, ["structs"])).only()


def _element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _array(kind, dims, *parts, name=b"v"):
    head = _element(6, struct.pack("<II", kind, 0)) + _element(
        5, struct.pack(f"<{len(dims)}i", *dims)
    )
    return head + _element(1, name) + b"".join(parts)


def _file(path, body, *, compressed=False, promised=None):
    size = len(body) if promised is None else promised
    element = struct.pack("<II", 14, size) + body
    if compressed:
        packed = zlib.compress(element, 9)
        element = struct.pack("<II", 15, len(packed)) + packed
    path.write_bytes(bytes(124) + b"\x00\x01IM" + element)


FIELDS = (_element(5, struct.pack("<i", 4)), _element(1, b"a\0\0\0"))
CRAFTED = {
    "entries": (_array(2, (2**31 - 1, 2**31 - 1), *FIELDS), "are promised in 0 bytes"),
    "cells": (_array(1, (2**31 - 1, 5)), "are promised in 0 bytes"),
    "numbers": (_array(6, (2**31 - 1, 9), _element(9, b"")), "0 bytes of float64 in an array of"),
    "negative": (_array(6, (-1, -1), _element(9, bytes(8))), "an array of -1x-1"),
    "no_fields": (_array(2, (2**31 - 1, 1), FIELDS[0], _element(1, b"")), "without fields"),
    "length_0": (_array(2, (1, 1), _element(5, bytes(4)), FIELDS[1]), "field names of 0 bytes"),
    "same_name": (
        _array(2, (1, 1), FIELDS[0], _element(1, b"a\0\0\0a\0\0\0"), bytes(64)),
        "two fields of the same name",
    ),
    "long_part": (_array(6, (1, 1), struct.pack("<II", 9, 2**32 - 1)), "promises 4294967295 bytes"),
    "short_part": (_array(6, (1, 1), struct.pack("<II", 7 << 16 | 9, 0)), "promises 7 bytes"),
    "no_dims": (_array(6, (), _element(9, bytes(8))), "a size of 0 bytes"),
    "many_dims": (_array(6, (1,) * 33, _element(9, bytes(8))), "a size of 132 bytes"),
    "class": (_array(77, (1, 1), _element(9, bytes(8))), "class 77, which does not exist"),
    "entry_too_long": (_array(2, (1, 1), *FIELDS, struct.pack("<II", 14, 99)), "ends too early"),
    "entry_no_matrix": (_array(2, (1, 1), *FIELDS, _element(9, bytes(8))), "of type 9, not a mat"),
    "more": (_array(2, (1, 1), *FIELDS, _element(14, b""), bytes(16)), "bytes follow"),
    "text": (_array(4, (1, 2**31 - 1), _element(16, b"abc")), "3 characters in an array of"),
    "not_utf8": (_array(4, (1, 2), _element(16, b"\xff\xfe")), "decode"),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_files_are_refused_without_memory(tmp_path, case, compressed):
    path = tmp_path / "a.mat"
    body, message = CRAFTED[case]
    _file(path, body, compressed=compressed)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        ours(read_variable(path, ["v"]))
    with pytest.raises(ValueError, match=r"."):
        list(read_structs(path, "v"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_promises_of_elements_are_held_against_the_file(tmp_path):
    path = tmp_path / "a.mat"
    body = _array(6, (1, 1), _element(9, bytes(8)))
    for compressed in (False, True):
        _file(path, body, compressed=compressed, promised=2**20)
        with pytest.raises(ValueError, match="ends too early"):
            read_variable(path, ["v"])
    _file(path, body, compressed=True, promised=2**32 - 1)
    with pytest.raises(ValueError, match=r"compressed bytes promise to become 4294967295,"):
        read_variable(path, ["v"])
    _file(path, body + bytes(64), compressed=True, promised=len(body))
    with pytest.raises(ValueError, match="more was compressed than the size says"):
        read_variable(path, ["v"])


def test_a_bomb_does_not_go_off(tmp_path):
    path = tmp_path / "a.mat"
    size = mat_stream.ALWAYS_ALLOWED + (1 << 20)
    body = _array(9, (1, size), _element(2, bytes(size)))
    _file(path, body, compressed=True)
    assert path.stat().st_size < size // 900
    del body
    tracemalloc.start()
    with pytest.raises(ValueError, match="promise to become"):
        read_variable(path, ["v"])
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_any_depth_is_read_without_recursion(tmp_path):
    path = tmp_path / "a.mat"
    body = _array(6, (1, 1), _element(9, bytes(8)), name=b"")
    for _ in range(3000):
        body = _array(1, (1, 1), _element(14, body), name=b"")
    _file(path, _array(2, (1, 1), *FIELDS, _element(14, body)))
    (row,) = read_structs(path, "v")
    depth, value = 0, row["a"]
    while class_of(value) == "cell":
        (value,) = cells(value)
        depth += 1
    assert depth == 3000
    assert numbers(value).tolist() == [0]
