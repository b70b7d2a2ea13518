"""The readers of what a run leaves behind, and of what is typed, that are fuzzed."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.arrays import restore_arrays
from alignps_jax.checkpoint.store import Checkpoints, load_arrays, load_config, load_weights
from alignps_jax.cli import parse
from alignps_jax.config import check_config
from alignps_jax.configuration import train_config
from alignps_jax.gallery.page.exports import as_csv
from alignps_jax.gallery.page.marks import Marked, Marks, Sight
from alignps_jax.log import LogLine, read_log
from alignps_jax.types import OIMMemory, TrainState, UserError
from alignps_jax.weights.tensor_files import Tensors, read_tensors
from configs import tiny
from tests.fuzz.mutations import damage, damage_json
from tests.fuzz.runner import Reader
from tests.fuzz.tensor_readers import check_tensors, damage_pickle, some_tensors

_HAS_TORCH = importlib.util.find_spec("torch") is not None


def _state() -> TrainState:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((3, 5)).astype(np.float32), "b": np.zeros(4, np.float32)}
    memory = OIMMemory(np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(0))
    return TrainState(np.int32(1), params, {"v": params["w"]}, (), memory)


def _checkpoint(folder: Path) -> Sequence[Path]:
    with Checkpoints(folder, keep=1, config=tiny.get_config().lock()) as checkpoints:
        checkpoints.save(_state(), {"position": 12}, 0.625)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_checkpoint(folder: Path) -> list[Any]:
    """All that evaluation, export and training take from a checkpoint."""
    return [
        load_config(folder),
        load_weights(folder, _state()),
        load_arrays(folder, lambda name: True),
        restore_arrays(folder / "checkpoints" / "1", _state()),
    ]


def _check_checkpoint(found: list[Any]) -> None:
    config, *trees = found
    # What is not sealed is checked; what is sealed is as it was written.
    assert config.to_dict() == tiny.get_config().to_dict(), "another configuration"
    expected = leaves_by_path(_state())
    for tree in trees:
        for path, leaf in leaves_by_path(tree).items():
            np.testing.assert_array_equal(leaf, expected[path.replace("['", "").replace("']", "")])


def damage_stored(rng: random.Random, data: bytes) -> bytes:
    """Changes of values of JSON, or of bytes."""
    return (damage_json if data[:1] == b"{" and rng.random() < 0.6 else damage)(rng, data)


def _run_config(folder: Path) -> Sequence[Path]:
    (folder / "config.json").write_text(tiny.get_config().to_json())
    return [folder / "config.json"]


def _resumed_config(folder: Path) -> ConfigDict:
    return train_config(parse(["launch.py", f"--workdir={folder}"]))


def _log(folder: Path) -> Sequence[Path]:
    lines: list[dict[str, object]] = [
        {"step": 10 * step, "loss": 1 / step, "grad_norm": None, "epoch": step} for step in (1, 2)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "log.jsonl").write_text(text)
    return [folder / "log.jsonl"]


def _check_log(lines: Sequence[LogLine]) -> None:
    for line in lines:
        assert type(line.step) is int, "a step that is no number"
        for name, value in line.values.items():
            assert isinstance(name, str), "a name that is no text"
            assert type(value) is float, "a value that is no number"


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    """Changes of values in one line of JSON, or of bytes."""
    lines = data.splitlines()
    if rng.random() < 0.4 or not lines:
        return damage(rng, data)
    number = rng.randrange(len(lines))
    lines[number] = damage_json(rng, lines[number])
    return b"\n".join(lines) + b"\n"


def _pth(folder: Path) -> Sequence[Path]:
    """Files of PyTorch: its own where it is installed, else archives that look like them."""
    content = {"state_dict": some_tensors(), "meta": {"epoch": 3}}
    if _HAS_TORCH:
        import torch

        arrays = some_tensors().items()
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays}
        for name, new in (("zip", True), ("old", False)):
            torch.save(
                {"state_dict": tensors}, folder / f"{name}.pth", _use_new_zipfile_serialization=new
            )
        return sorted(folder.iterdir())
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    (folder / "old.pth").write_bytes(magic + pickle.dumps(content, protocol=2))
    return sorted(folder.iterdir())


def _read_pth(path: Path) -> Tensors:
    try:
        return read_tensors(path)
    except UserError as error:
        if not _HAS_TORCH and "need PyTorch" in str(error):
            return {}  # as far as one comes without
        raise


def damage_pth(rng: random.Random, data: bytes) -> bytes:
    """Changes of the pickled program behind the checksums of the archive, or of bytes."""
    if rng.random() < 0.3 or not data.startswith(b"PK"):
        return rng.choice((damage, damage_pickle))(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(members))
    change = damage_pickle if chosen.endswith(".pkl") and rng.random() < 0.7 else damage
    members[chosen] = change(rng, members[chosen])
    target = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", packing) as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return target.getvalue()


def _marks(folder: Path) -> Sequence[Path]:
    path = folder / "people.marks.json"
    marks = Marks(path)
    views = [
        Sight("0-0", str(folder / "a.jpg"), None, (90, 160), (1, 2, 30, 80), 0.9),
        Sight("up.0.1", "b.jpg", None, (0, 0), (1, 2, 30, 80), 0.5, uploaded=True),
    ]
    for number in range(3):
        second = None if number < 2 else 2.5
        person = Sight(f"1-{number}", f"/c{number}", second, (90, 160), (1, 2, 30, 80), 0.7)
        marks.set(views[: 1 + number % 2], person, 0.6, "wrong" if number else "right")
    return [path]


def _read_marks(path: Path) -> tuple[list[Marked], bytes]:
    queries = Marks(path).all()
    return queries, as_csv(queries)


def _check_marks(found: tuple[list[Marked], bytes]) -> None:
    for marked in found[0]:
        for sight in (*marked.views, *(mark.person for mark in marked.marks.values())):
            assert np.isfinite([*sight.box, *sight.size, sight.score]).all()
    assert len(found[1].splitlines()) > sum(len(marked.marks) for marked in found[0])


RUN_READERS: dict[str, Reader] = {
    # JAX and TensorStore start threads, which take room but no memory.
    "checkpoints": Reader(
        build=_checkpoint,
        read=lambda folder, _: _read_checkpoint(folder),
        check=_check_checkpoint,
        damage=damage_stored,
        seconds=30.0,
        memory=16 << 30,
    ),
    "pth": Reader(
        build=_pth,
        read=lambda _, path: _read_pth(path),
        check=check_tensors,
        damage=damage_pth,
        seconds=30.0,
        memory=4 << 30,
    ),
    "log": Reader(
        build=_log,
        read=lambda _, path: read_log(path),
        check=_check_log,
        damage=damage_lines,
    ),
    "run_config": Reader(
        build=_run_config,
        read=lambda folder, _: _resumed_config(folder),
        check=check_config,
        damage=damage_stored,
    ),
    "marks": Reader(
        build=_marks,
        read=lambda _, path: _read_marks(path),
        check=_check_marks,
        damage=damage_json,
    ),
}
