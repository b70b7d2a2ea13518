"""MATLAB files against SciPy's reading of the same ones, and files that end too early."""

import tracemalloc

import numpy as np
import pytest
import scipy.io

from data_pipeline.sources.matlab import cells, numbers, read_variable, structs, text
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.places import SHARED

NUMERIC = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?")
REAL_PROTOCOL = SHARED / "TestG100.mat"


def ours(value):
    """All of a value in lists, with the fields of a struct in order; byte 8 is its class."""
    value = value if isinstance(value, bytes) else value.read(1 << 30)
    kind = value[8] if value else 6
    if kind == 2:
        return [[(name, ours(field)) for name, field in row.items()] for row in structs(value)]
    if kind == 1:
        return [ours(cell) for cell in cells(value)]
    return text(value) if kind == 4 else listed(numbers(value))


def theirs(array):
    """The same of what SciPy reads."""
    rows = array.ravel(order="F")
    if array.dtype.names:
        return [[(name, theirs(row[name])) for name in array.dtype.names] for row in rows]
    if array.dtype == object:
        return [theirs(cell) for cell in rows]
    return "".join(array) if array.dtype.kind == "U" else listed(array)


def listed(array):
    return array.tolist() if array.size else []


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


@pytest.mark.parametrize("seed", range(24))
def test_random_values_are_those_that_scipy_reads(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.mat"
    variables = {name: random_value(rng, 3) for name in ("a", "b", "c")}
    scipy.io.savemat(path, variables, do_compression=bool(seed % 2), long_field_names=seed % 3 > 0)
    expected = scipy.io.loadmat(path)
    for name in variables:  # the first of the requested names that the file has
        assert ours(read_variable(path, "absent", name, "a")) == theirs(expected[name])


@pytest.mark.skipif(not REAL_PROTOCOL.is_file(), reason="the real TestG100.mat is not here")
def test_one_entry_is_in_memory_beside_the_compressed_file():
    tracemalloc.start()
    rows = structs(read_variable(REAL_PROTOCOL, "TestG100"))
    size = sum(len(row["Gallery"]) for row in rows)
    peak = tracemalloc.get_traced_memory()[1] - REAL_PROTOCOL.stat().st_size
    tracemalloc.stop()
    assert peak < 1 << 20 < size // 20


def test_what_is_not_there_or_not_whole_is_an_error(tmp_path):
    path = tmp_path / "a.mat"
    wanted = fixtures.structs([{"name": "sé.jpg", "where": np.zeros((1, 4))}] * 3)
    scipy.io.savemat(path, {"other": np.arange(9), "wanted": wanted}, do_compression=True)
    with pytest.raises(ValueError, match="'absent' is not among other, wanted"):
        read_variable(path, "absent")
    with pytest.raises(ValueError, match="holds numbers where structs belong"):
        list(structs(read_variable(path, "other")))
    whole = path.read_bytes()
    damaged = [
        (whole[:size], "ends too early|not a little-endian|'wanted' is not")
        for size in range(0, 300, 9)
    ]
    damaged += [(whole[:-1] + bytes([whole[-1] ^ 1]), "decompressed .*incorrect data check")]
    for data, message in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            list(structs(read_variable(path, "wanted")))
