"""Damaged and crafted checkpoints: one clear line, or what was saved; nothing in between."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.checkpoint import arrays
from alignps_jax.checkpoint.store import Checkpoints, load_arrays, load_config, load_weights
from alignps_jax.types import OIMMemory, TrainState, UserError
from tests.fuzz.mutations import damage, damage_json

CONFIG = ConfigDict({"model": {"stages": (3, 4), "name": "é"}, "seed": 7}).lock()
INPUTS = 3  # of every file


def state() -> TrainState:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((3, 5)).astype(np.float32), "b": np.zeros(4, np.float32)}
    memory = OIMMemory(np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(0))
    return TrainState(np.int32(1), params, {"v": params["w"]}, (), memory)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sound")
    with Checkpoints(workdir, keep=1, config=CONFIG) as checkpoints:
        checkpoints.save(state(), {"position": 12, "name": "abc"}, 0.625)
    return workdir


def read_everything(workdir: Path) -> list:
    """All that a checkpoint holds, through every function that reads one."""
    config = load_config(workdir).to_dict()
    weights = load_weights(workdir, state())
    everything = load_arrays(workdir, lambda name: True)
    checkpoints = Checkpoints(workdir, keep=1, config=CONFIG)
    try:
        restored, iterator_state = checkpoints.restore(state())
    finally:
        checkpoints.__exit__()
    tree = [weights, restored, everything]
    leaves = [(np.asarray(x).dtype.name, np.asarray(x).tolist()) for x in jax.tree.leaves(tree)]
    return [config, leaves, iterator_state]


def files_of(workdir: Path) -> list[Path]:
    return sorted(path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())


def outcome(workdir: Path) -> str | list:
    try:
        return read_everything(workdir)
    except UserError as error:
        return str(error)


def damaged(name: Path, content: bytes, number: int) -> bytes:
    rng = random.Random(f"{name}/{number}")
    is_json = content[:1] == b"{" and number % 2
    return (damage_json if is_json else damage)(rng, content)


def test_no_damage_goes_unnoticed(sound, tmp_path):
    expected = read_everything(sound)
    refused = set()
    for name in files_of(sound):
        content = (sound / name).read_bytes()
        for number in range(INPUTS):
            workdir = shutil.copytree(sound, tmp_path / "damaged")
            (workdir / name).write_bytes(damaged(name, content, number))
            found = outcome(workdir)
            if isinstance(found, str):
                assert found.isprintable(), (name, number)
                assert found.startswith(f"{workdir}"), (name, number, found)
                assert len(found) < 500, (name, number, found)
                refused.add(name.parts[2] if len(name.parts) > 2 else name.name)
            else:
                assert found == expected, (name, number)
            shutil.rmtree(workdir)
    assert {"model", "training", "manifest"} <= refused


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_checksum(change):
    def changed(content):
        del content["crc32"]
        change(content)

    return changed


MANIFESTS = {
    "a wrong checksum": lambda content: content["config"].update(seed=8),
    "an unknown field": without_checksum(lambda content: content.update(crc33=1)),
    "terabytes": without_checksum(
        lambda content: content["arrays"]["params/w"].update(type=f"float32[{2**40}, 5]")
    ),
    "another type": without_checksum(
        lambda content: content["arrays"]["params/w"].update(type="float64[3, 5]")
    ),
    "another shape": without_checksum(
        lambda content: content["arrays"]["params/w"].update(type="float32[5, 3]")
    ),
    "no type": without_checksum(
        lambda content: content["arrays"]["params/w"].update(type="nothing[3]")
    ),
    "no arrays": without_checksum(lambda content: content.update(arrays=3)),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_are_not_believed(case, sound, tmp_path):
    workdir = shutil.copytree(sound, tmp_path / "crafted")
    change_json(workdir / "checkpoints/1/manifest/metadata", MANIFESTS[case])
    for read in (
        lambda: load_arrays(workdir, lambda name: True),
        lambda: load_weights(workdir, state()),
    ):
        with pytest.raises(UserError, match=r"/1: (damaged checkpoint|does not fit)") as error:
            read()
        assert str(error.value).isprintable()


JSON_FILES = ("manifest/metadata", "metrics/metrics", "iterator/process_0-of-1")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", ["size", "deep", "empty", "number", "text"])
def test_files_of_json_are_bounded(name, content, sound, tmp_path):
    workdir = shutil.copytree(sound, tmp_path / "crafted")
    file = workdir / "checkpoints" / "1" / name
    file.write_bytes(
        {"deep": b"[" * 200_000, "number": b"7", "text": b"\xff\xfe"}.get(content, b"")
    )
    if content == "size":
        os.truncate(file, 2**34)  # without taking room on the disk
    found = outcome(workdir)
    assert "damaged checkpoint" in found
    assert found.isprintable()


def test_checkpoints_without_checksums_of_their_json_are_read(sound, tmp_path):
    """As earlier versions wrote them."""
    workdir = shutil.copytree(sound, tmp_path / "old")
    for name in JSON_FILES:
        change_json(workdir / "checkpoints" / "1" / name, lambda content: content.pop("crc32"))
    assert read_everything(workdir) == read_everything(sound)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_what_the_system_says_is_no_damage(error, sound, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(arrays, "read_json", fail)
    with pytest.raises((UserError, MemoryError)) as caught:
        load_config(sound)
    assert "damaged" not in str(caught.value)
    assert isinstance(error, MemoryError) or str(caught.value).endswith("(Stale file handle)")
