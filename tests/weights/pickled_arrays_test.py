"""Pickles of arrays: NumPy's own come back exactly, crafted ones are refused without harm."""

from __future__ import annotations

import collections
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from alignps_jax.types import UserError
from alignps_jax.weights.pickled_arrays import PickledArray, load_pickled
from alignps_jax.weights.tensor_files import read_tensors
from tests.weights.malicious import Malicious


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def dtype(
    code: str, order: bytes = text("<"), rest: bytes = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0"
):
    """Instructions that make a type."""
    return b"cnumpy\ndtype\n" + text(code) + b"K\0K\x01\x87R(K\x03" + order + rest + b"tb"


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


def array(shape: bytes, kind: bytes, content: bytes, order: bytes = b"\x89") -> bytes:
    """Instructions that make an array."""
    return (
        RECONSTRUCT + b"cnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01" + shape + kind + order + content + b"tb"
    )


def data(content: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(content)) + content


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_come_back(protocol, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((2, 3, 5)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4))),
        "big": rng.standard_normal((7, 3)).astype(">f4"),
        "half": rng.standard_normal(400).astype(np.float16),
        "bytes": np.arange(256, dtype=np.uint8),
        "integer": np.array(-(2**60)),
        "scalar": np.float32(0.1),
        "empty": np.zeros((0, 4), np.float32),
        "again": None,
    }
    arrays["again"] = arrays["a"]
    for content in (
        arrays,
        collections.OrderedDict(arrays),
        {"model": arrays, "__author__": "é", "list": [1, (2.5, None, True)], "state": 2**40},
    ):
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        found = read_tensors(path)
        assert list(found) == list(arrays)
        for name, expected in arrays.items():
            assert found[name].dtype == expected.dtype.newbyteorder("="), name
            np.testing.assert_array_equal(found[name], expected)


def test_python_2_files_come_back():
    """There text and bytes are the same, and an OrderedDict is called with its pairs."""
    pairs = (
        b"ccollections\nOrderedDict\n]](U\x01a"
        + array(b"K\x02K\x01\x86", dtype("f4"), data(struct.pack("<ff", 1.5, -2)))
        + b"ea\x85R"
    )
    found = load_pickled(b"\x80\x02" + pairs + b".")
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"].value, np.array([[1.5], [-2]], np.float32))


def test_nothing_is_executed(tmp_path):
    source, marker = tmp_path / "source.pkl", tmp_path / "marker"
    for content in (
        {"model": {"conv1.weight": Malicious(marker)}},
        {"model": collections.Counter("a")},
        Malicious(marker),
        np.random.default_rng(),
        {"a": np.zeros(3, "datetime64[s]"), "b": int},
    ):
        for protocol in (2, 4):
            source.write_bytes(pickle.dumps(content, protocol=protocol))
            with pytest.raises(UserError, match=r"source.pkl: ") as error:
                read_tensors(source)
            assert "\n" not in str(error.value)
            assert not marker.exists()
    source.write_bytes(pickle.dumps({"a": Malicious(marker)}, protocol=2))
    with pytest.raises(UserError, match=r"else than arrays \(posix.mkdir\); nothing of it "):
        read_tensors(source)


@pytest.mark.parametrize(
    "value",
    [np.array([{}], object), np.zeros(2, "f4,i4"), np.array(["a"]), np.array([b"a"]), [1], "text"],
    ids=["objects", "fields", "text", "bytes", "list", "str"],
)
def test_only_numbers_are_arrays(value, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": value}, protocol=2))
    with pytest.raises(UserError, match=r"a.pkl: .*expected (numbers|a float32 tensor)"):
        read_tensors(tmp_path / "a.pkl")


ONE = struct.pack("<f", 1)
F4 = dtype("f4")
CRAFTED = {
    # NumPy's own dtype takes such a state for pointers to objects.
    "dtype O8 with a state": dtype("O8", text("|"), b"NNNK\x08K\x01K?"),
    "dtype O8 in an array": array(b"K\x01\x85", dtype("O8"), data(b"A" * 8)),
    "dtype with fields": dtype("f4", text("<"), b"N" + text("a") + b"\x85}K\x04K\x01K\0"),
    "dtype with a subarray": dtype("f4", text("<"), b"K\x01K\x02\x86NNK\x04K\x01K\0"),
    "dtype with state of numbers": dtype("f4", b"K\x01"),
    "dtype with state None": b"cnumpy\ndtype\n" + text("f4") + b"K\0K\x01\x87RNb",
    "dtype of one argument": b"cnumpy\ndtype\n" + text("f4") + b"\x85R",
    "dtype of a number": b"cnumpy\ndtype\nK\x01K\0K\x01\x87R",
    "ndarray called": b"cnumpy\nndarray\nK\x05\x85R",
    "a call of a call": b"ccollections\nOrderedDict\n)R)R",
    "a call of text": text("eval") + b")R",
    "a call of an array": array(b"K\x01\x85", F4, data(ONE)) + b")R",
    "a call without a tuple": b"ccollections\nOrderedDict\nK\x01R",
    "attributes of a name": b"ccollections\nOrderedDict\n}b",
    "a new object": b"ccollections\nOrderedDict\n)\x81",
    "an extension": b"\x82\x01",
    "a persistent id": text("a") + b"Q",
    "an attribute path": text("numpy.core.multiarray") + text("_reconstruct.__globals__") + b"\x93",
    "an array filled twice": array(b"K\x01\x85", F4, data(ONE))
    + b"(K\x01K\x01\x85"
    + F4
    + b"\x89"
    + data(ONE)
    + b"tb",
    "an array of three states": RECONSTRUCT + b"NNN\x87RK\x01K\x02K\x03\x87b",
    "a shape larger than the content": array(b"J\xff\xff\xff\x7f\x85", F4, data(ONE)),
    "a shape below zero": array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", F4, data(ONE)),
    "a shape of terabytes of nothing": array(
        b"K\0\x8a\x08" + b"\xff" * 7 + b"\x7f\x86", F4, data(b"")
    ),
    "a shape of text": array(text("a") + b"\x85", F4, data(ONE)),
    "a shape of true": array(b"\x88\x85", F4, data(ONE)),
    "a shape of 40 dimensions": array(b"(" + b"K\x01" * 40 + b"t", F4, data(ONE)),
    "content that is a list": array(b"K\x01\x85", F4, b"]N\x61"),
    "content that is long text": array(b"K\x01\x85", F4, text("a" * 2000)),
    "content cut off": array(b"K\x01\x85", F4, b"T\xff\xff\xff\x7fabc"),
    "bytes of 2**63": b"\x8e" + struct.pack("<Q", 2**63),
    "text of 2**64 - 1": b"\x8d" + struct.pack("<Q", 2**64 - 1),
    "a bytearray of 2**40": b"\x96" + struct.pack("<Q", 2**40),
    "an integer of 200 bytes": b"\x8a\xc8" + b"1" * 200,
    "an integer of a gigabyte": b"\x8b\0\0\0\x40",
    "an integer in decimals": b"L" + b"9" * 10_000 + b"L\n",
    "nothing to recall": b"j\xff\xff\xff\xff",
    "nothing to remember": b"r\xff\xff\xff\xff",
    "nothing to pop": b"0",
    "no mark": b"t",
    "a mark in the way": b"K\x01(\x85",
    "a key that is a tuple": b"}))s",
    "a key that is a list": b"}])s",
    "a key without a value": b"}(K\x01u",
    "items for a tuple": b")K\x01a",
    "items for an array": array(b"K\x01\x85", F4, data(ONE)) + b"K\x01K\x02s",
    "text that is not UTF-8": b"X\x01\0\0\0\xff",
    "a name without an end": b"c" + b"a" * 10_000,
    "another encoding": b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R",
    "the encoding of a number": b"c_codecs\nencode\nK\x01" + text("latin1") + b"\x86R",
    "text beyond latin1": b"c_codecs\nencode\nX\x03\0\0\0\xe2\x82\xac" + text("latin1") + b"\x86R",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_pickles_are_refused(case, tmp_path):
    for ending in (b".", text("a") + b"N\x86."):
        path = tmp_path / "crafted.pkl"
        path.write_bytes(b"\x80\x02" + CRAFTED[case] + ending)
        with pytest.raises(UserError, match=r"crafted.pkl: (damaged or cut off|found)") as error:
            read_tensors(path)
        assert len(str(error.value)) < len(str(path)) + 250
        assert str(error.value).isprintable()


def bomb(name: str) -> bytes:
    laughs = b")q\0" + b"0h\0h\0\x86q\0" * 200  # a tuple of 2**200 leaves
    pairs = b"](" + b"](K\x01Ne" * 2000 + b"e"
    return {
        "tuples as a key": b"}" + laughs + b"Ns",
        "tuples as a shape": array(laughs, F4, data(ONE)),
        "tuples as an argument": b"cnumpy\ndtype\n" + laughs + b"R",
        "tuples as a type": b"cnumpy\ndtype\n" + laughs + b"NN\x87R",
        "tuples as a value": b"}U\x01a" + laughs + b"s",
        "deep lists": b"]" * 300_000 + b"a" * 299_999,
        "deep tuples": b")" + b"\x85" * 500_000,
        "deep dictionaries": b"}" + b"K\x01}" * 200_000 + b"s" * 200_000,
        "a list in itself": b"]q\0h\0a",
        "a dictionary in itself": b"}q\0U\x0astate_dicth\0s",
        "a memo of 2**32": b"Nr\xff\xff\xff\xff",
        "marks": b"(" * 900_000,
        "endless instructions": b"N0" * 600_000,
        "text encoded again and again": text("a" * 100_000)
        + b"q\0"
        + b"0c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 10_000,
        "pairs again and again": pairs + b"q\0" + b"0ccollections\nOrderedDict\nh\0\x85R" * 10_000,
        "bytes swapped again and again": data(b"a" * 100_000)
        + b"q\0"
        + dtype("f4", text(">"))
        + b"q\x010"
        + (b"cnumpy.core.numeric\n_frombuffer\n(h\0h\x01M\xa8\x61\x85U\x01Ct" + b"R0") * 20_000,
        "keys made of bytes again and again": data(b"a" * 100_000) + b"q\0" + b"0}h\0Ns" * 50_000,
    }[name]


BOMBS = (
    *("tuples as a key", "tuples as a shape", "tuples as an argument", "tuples as a type"),
    *("tuples as a value", "deep lists", "deep tuples", "deep dictionaries", "a list in itself"),
    *("a dictionary in itself", "a memo of 2**32", "marks", "endless instructions"),
    *("text encoded again and again", "pairs again and again", "bytes swapped again and again"),
    "keys made of bytes again and again",
)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.usefixtures("unchecked")  # a check per call would take most of the time
def test_bombs_take_neither_time_nor_memory(name, tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(b"\x80\x02" + bomb(name) + b".")
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb.pkl: .*(damaged or cut off|found)"):
            read_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    assert time.process_time() - began < 60  # tracemalloc makes it ten times as slow


def test_an_honest_file_takes_no_more_memory_than_it_has_bytes(tmp_path):
    content = {"a": np.ones((1000, 1000)), "b": np.ones((500, 1000))}
    for protocol in (4, 5):
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        tracemalloc.start()
        try:
            found = read_tensors(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1.3 * path.stat().st_size
        assert found["a"].shape == (1000, 1000)


def test_the_attack_on_numpy_does_not_end_the_process(tmp_path):
    """As --mode=convert would meet it, in a process that may die."""
    path = tmp_path / "attack.pkl"
    path.write_bytes(b"\x80\x02" + CRAFTED["dtype O8 in an array"] + b".")
    program = (
        "import sys, pathlib\n"
        "from alignps_jax.types import UserError\n"
        "from alignps_jax.weights.tensor_files import read_tensors\n"
        "try:\n    read_tensors(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "found an array of type 'O8', expected numbers" in done.stdout


def test_an_array_that_is_never_filled_is_an_error(tmp_path):
    path = tmp_path / "a.pkl"
    empty = RECONSTRUCT + b"NNN\x87R"
    assert load_pickled(b"\x80\x02" + empty + b".") == PickledArray()
    path.write_bytes(b"\x80\x02}U\x01a" + empty + b"s.")
    with pytest.raises(UserError, match=r"'a': found PickledArray, expected a float32 tensor"):
        read_tensors(path)
