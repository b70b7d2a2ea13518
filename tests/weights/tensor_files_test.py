"""Files of tensors: what others write is read, what is damaged or does harm is refused."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from alignps_jax.types import UserError
from alignps_jax.weights.tensor_files import read_tensors, write_tensors

TENSORS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(7),
    "half": np.ones(3, np.float16),
    "brain": np.array([1.5, -2], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 2), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
}


class Malicious:
    """Unpickled the ordinary way, this makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_same(found, expected) -> None:
    """Numbers with a point come as float32, which has all of those here."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == (np.int64 if name == "count" else np.float32)
        np.testing.assert_array_equal(found[name], value.astype(np.float64))


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "new folder" / "a.safetensors"
    write_tensors(path, TENSORS, {"who": "test"})
    assert_same(read_tensors(path), TENSORS)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "who": "test"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_index_stands_for_its_shards_which_lie_beside_it(tmp_path):
    names = list(TENSORS)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for shard, part in shards.items():
        write_tensors(tmp_path / shard, {name: TENSORS[name] for name in part}, {})
    # Names lead nowhere else.
    places = {name: f"../{shard}" for shard, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_same(read_tensors(index), TENSORS)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        read_tensors(index)


NO_WEIGHTS = {
    "empty": (b"", "found an unknown format, expected .pth or .safetensors"),
    "text": (b"hello, this is no file of weights", "found an unknown format"),
    "a page": (b"\n<!DOCTYPE html><html>Sign in</html>", "found a web page, expected"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    "detectron2": (b"\x80\x02}q\0.", "found a pickle, as of detectron2 and Caffe2"),
    "no index": (b"{}", "weight_map"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_files_of_something_else_are_refused_in_one_line(case, tmp_path):
    content, message = NO_WEIGHTS[case]
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_tensors(tmp_path / "a.pth")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.4.0", "found PyTorch 2.4.0, expected 2.10 or newer"),
        (None, r"need PyTorch, .* pip install '\.\[torch\]'"),
    ],
)
def test_no_pytorch_or_an_old_one_is_refused_by_name(version, message, tmp_path, monkeypatch):
    """The loader of an old one has holes, so it is not even called."""
    old = version and types.ModuleType("torch")
    if old:
        old.__version__ = version
    monkeypatch.setitem(sys.modules, "torch", old)
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"b.pth: .*{message}"):
        write_tensors(tmp_path / "b.pth", TENSORS, {})
    assert not (tmp_path / "b.pth").exists()


def torch_tensors(torch) -> dict:
    tensors = {k: torch.from_numpy(np.array(x)) for k, x in TENSORS.items() if k != "brain"}
    return tensors | {"brain": torch.tensor([1.5, -2], dtype=torch.bfloat16)}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_tensor_in_a_pth_file_is_never_run(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    path, marker = tmp_path / "a.pth", tmp_path / "marker"
    for bad, averaged, message in (
        ({"state_dict": {}, "meta": Malicious(marker)}, False, "not a tensor .*mkdir"),
        ({"state_dict": {"a": "text"}}, False, "found a, expected named tensors"),
        ({"ema": {"a": torch.ones(2)}}, False, "found ema, expected named tensors"),
        ({"ema.a": torch.ones(2)}, False, "a running average of weights only .*--ema"),
        ({"state_dict": {"a": torch.ones(2)}}, True, "found no running average"),
        ([1, 2], False, "found list, expected named tensors"),
    ):
        torch.save(bad, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=message):
            read_tensors(path, averaged)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_damaged_files_are_refused_or_hold_numbers(form, tmp_path):
    path = tmp_path / "a"
    if form == "safetensors":
        write_tensors(path, TENSORS, {})
    else:
        torch = pytest.importorskip("torch")
        tensors = torch_tensors(torch)
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    sound = path.read_bytes()
    assert_same(read_tensors(path), TENSORS)

    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(sound), 200):
        rest = rng.bytes(1) + sound[at + 1 :] if at % 4 else b""
        path.write_bytes(sound[:at] + rest)
        with contextlib.suppress(ValueError):  # anything else fails the test
            assert all(value.dtype.kind in "iuf" for value in read_tensors(path).values())
