"""Nested structs against SciPy's reading of the same files, and files that are none."""

import zlib

import numpy as np
import pytest
import scipy.io

from data_pipeline.sources.mat_structs import Structs, numbers, read_structs, text
from tests.data_pipeline import dataset_fixtures as fixtures

ENTRIES = [
    {"name": "s1.jpg", "where": np.array([[1, 2, 300, 4]], np.uint16), "none": np.zeros((1, 0))},
    {"name": "sé.jpg", "where": np.array([[-1.5, 2, 3, 4]]), "none": np.zeros((0, 0))},
    {"name": "x", "where": np.array([[7]], np.int8), "none": np.zeros((1, 0))},
    {"name": "", "where": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros((1, 0))},
]


def write(path, variable=None, *, compressed=True, count=3):
    outer = [
        {"Few": fixtures.structs(ENTRIES[:1]), "Gallery": fixtures.structs(ENTRIES[:n])}
        for n in range(count + 1)
    ]
    variables = {"other": np.arange(9), "wanted": fixtures.structs(outer)} if not variable else {}
    scipy.io.savemat(path, variables or variable, do_compression=compressed)


@pytest.mark.parametrize("compressed", [True, False])
def test_entries_are_those_that_scipy_reads(tmp_path, compressed):
    path = tmp_path / "a.mat"
    write(path, compressed=compressed, count=4)
    ours = list(read_structs(path, "wanted"))
    expected = scipy.io.loadmat(path)["wanted"].ravel()
    assert len(ours) == len(expected) == 5
    for row, reference in zip(ours, expected, strict=True):
        assert list(row) == ["Few", "Gallery"]
        gallery = Structs.of(row["Gallery"])
        assert gallery.count == reference["Gallery"].size
        for entry, fields in zip(gallery, reference["Gallery"].ravel(), strict=True):
            assert gallery.fields == ("name", "where", "none")
            name, where, none = entry
            assert text(name) == "".join(fields["name"])
            np.testing.assert_array_equal(numbers(where), fields["where"].ravel(order="F"))
            assert numbers(none).size == 0


def test_a_damaged_or_other_file_is_an_error(tmp_path):
    path = tmp_path / "a.mat"
    write(path)
    whole = path.read_bytes()
    for data, error in (
        (whole[:-40], EOFError),
        (whole[:150], (EOFError, zlib.error)),
        (b"", ValueError),
        (b"MATLAB, honestly", ValueError),
        (whole[:126] + b"MI" + whole[128:], ValueError),  # of the other byte order
    ):
        path.write_bytes(data)
        with pytest.raises(error):
            list(read_structs(path, "wanted"))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="holds the variables other, wanted"):
        list(read_structs(path, "absent"))
    with pytest.raises(ValueError, match="not of structs"):
        list(read_structs(path, "other"))
    write(path, {"wanted": fixtures.structs([{"a": np.arange(3)}])})
    (row,) = read_structs(path, "wanted")
    with pytest.raises(ValueError, match="not of structs"):
        Structs.of(row["a"])
    with pytest.raises(ValueError, match="not of characters"):
        text(row["a"])
    write(path)
    for row in read_structs(path, "wanted"):
        with pytest.raises(ValueError, match="not of numbers"):
            numbers(row["Few"])
