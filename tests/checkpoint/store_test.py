"""Checkpoints: exact, complete after any kill, and refused where they are damaged or do not fit.

Run as a program (`python -m tests.checkpoint.store_test <child> ...`) this file is the process
that the tests kill, or one of several of a run.
"""

from __future__ import annotations

import collections
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignps_jax.checkpoint.arrays import reading
from alignps_jax.checkpoint.lock import one_writer
from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.checkpoint.store import (
    Checkpoints,
    load_arrays,
    load_config,
    load_run_config,
    load_weights,
    package_versions,
    write_run_info,
)
from alignps_jax.types import OIMMemory, TrainState, UserError
from configs.cuhk import get_config
from tests.places import ROOT, free_port

CONFIG = get_config()
CONFIG.data.validation_fraction = 0.25  # the best step is the one that counts


def make_state(step: int, queue: int = 5) -> TrainState:
    """A state that depends on `step` everywhere, with every kind of leaf and node we meet."""
    rng = np.random.default_rng(step)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "neck": {"lateral3": {"kernel": normal(3, 2, 5)}},
        "head": {"scale": jnp.bfloat16(rng.normal()), "bias": jnp.array([np.nan, -0.0, np.inf])},
        "nothing": {},
    }
    pairs = jnp.arange(6, dtype=jnp.uint32) + step, jnp.array([True, False])
    frozen = {"statistics": pairs, "large": normal(100, 100)}
    decayed = {"neck": True, "head": False, "nothing": {}}
    optimizer = optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), decayed),
        optax.adam(optax.constant_schedule(0.1)),
    )
    memory = OIMMemory(normal(7, 4), normal(queue, 4), jnp.int32(step % 5))
    return TrainState(jnp.int32(step), params, frozen, optimizer.init(params), memory)


def assert_same(found, expected) -> None:
    """The same structure, types, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def open_checkpoints(workdir: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(workdir, keep=keep, config=CONFIG)


def restored_step(workdir: Path) -> int:
    """The newest step, after its content was compared."""
    with open_checkpoints(workdir) as checkpoints:
        state, iterator_state = checkpoints.restore(make_state(0))
    assert_same(state, make_state(int(state.step)))
    assert iterator_state == {"position": state.step}
    return int(state.step)


def steps_in(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def best_step(workdir: Path) -> int:
    """The step that readers take."""
    return int(load_arrays(workdir, lambda name: name == "step")["step"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with step 1 (score 0.5), 2 (score 0.9) and 3 (no score)."""
    workdir = tmp_path_factory.mktemp("saved")
    with open_checkpoints(workdir, keep=3) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.9), (3, None)):
            checkpoints.save(make_state(step), {"position": step}, score)
    return workdir


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("queue", [5, 0])
def test_round_trip_is_exact_and_says_nothing(tmp_path, queue, capfd):
    """From four devices to one, though steps take the buffers that are saved and restored."""

    def plus_one(tree, _):
        return jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), tree)

    increase = jax.pmap(plus_one, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    state = increase(make_state(4, queue), np.zeros(4))
    host, position = np.ones((300, 300), np.float32), [1, {"a": None}]
    state = state.replace(frozen={"host": host, **state.frozen})
    expected = jax.tree.map(np.array, state)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, position)
        host[:] = position[0] = -1
        for _ in range(5):
            state = increase(state, np.zeros(4))
        restored, found = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same(restored, expected)
    assert found == [1, {"a": None}]
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(restored))
    assert (increase(restored, np.zeros(4)).frozen["host"] == 2).all()
    assert capfd.readouterr() == ("", "")


def test_keeps_the_latest_and_the_best(tmp_path):
    scores = {1: None, 2: 0.5, 3: 0.7, 4: None, 5: 0.7, 6: 0.1, 7: float("nan"), 8: None, 9: -1.0}
    kept = []
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        for step, score in scores.items():
            checkpoints.save(make_state(step), None, score)
            assert checkpoints.latest_step() == step
            kept.append([int(name) for name in steps_in(tmp_path)])
        assert best_step(tmp_path) == 5
    assert kept == [*([1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8], [5, 8, 9])]
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        assert (checkpoints.latest_step(), best_step(tmp_path)) == (9, 5)
        checkpoints.save(make_state(10), None)
    assert steps_in(tmp_path) == ["10", "5"]


def test_a_score_can_follow_its_checkpoint(tmp_path):
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1), {"position": 1})
        assert not checkpoints.has_score(1)
        for score in (0.5, 0.6, None):
            checkpoints.save(make_state(1), {"position": -1}, score)
        assert checkpoints.has_score(1)
        assert checkpoints.restore(make_state(0))[1] == {"position": 1}
        checkpoints.save(make_state(2), {"position": 2}, score=0.55)
        checkpoints.save(make_state(3), {"position": 3})
        checkpoints.wait()
        assert best_step(tmp_path) == 1
        with pytest.raises(TypeError):
            checkpoints.save(make_state(6), {"position": object()})
    assert steps_in(tmp_path) == ["1", "3"]


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_that_does_not_fit_is_refused(saved):
    state, empty = make_state(0), make_state(0, queue=0)
    kernel = {"neck": {"lateral3": {"kernel": jnp.zeros((3, 3, 5))}}}
    cases = {
        "params/neck/lateral3/kernel: found float32[3, 2, 5], expected float32[3, 3, 5]; "
        "params/head/bias: found float32[3], expected nothing; "
        "params/head/scale: found bfloat16[], expected nothing": state.replace(params=kernel),
        "frozen/new: found nothing, expected float32[2]; "
        "memory/queue: found float32[5, 4], expected float32[0, 4]; "
        "frozen/large: found float32[100, 100], expected nothing; and 2 more": (
            state.replace(memory=empty.memory, frozen={"new": jnp.zeros(2)})
        ),
    }
    with open_checkpoints(saved, keep=3) as checkpoints:
        for message, template in cases.items():
            with pytest.raises(UserError) as error:
                checkpoints.restore(template)
            assert str(error.value) == f"{saved}/checkpoints/3: does not fit: {message}"


def test_weights_of_the_chosen_or_one_step(saved, copied):
    def load(path):
        weights = load_weights(path, jax.eval_shape(lambda: make_state(0)))
        expected = make_state(int(weights.step))
        assert_same((weights.params, weights.frozen), (expected.params, expected.frozen))
        return int(weights.step)

    root = saved / "checkpoints"
    assert [load(path) for path in (saved, root, root / "1", root / "3")] == [2, 2, 1, 3]
    # One step's folder, anywhere, under any name.
    alone = (copied / "checkpoints" / "1").rename(copied.parent / "alone")
    assert load(alone) == 1
    # Without any score the newest is the best there is.
    shutil.rmtree(copied / "checkpoints" / "2" / "metrics")
    assert load(copied) == 3
    for nowhere in (copied.parent, copied / "no-such-place"):
        with pytest.raises(UserError, match=f"{nowhere}: found no checkpoint"):
            load(nowhere)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
@pytest.mark.parametrize("on_test", [False, True])
def test_the_last_step_counts_unless_a_split_chooses(saved, fraction, on_test):
    config = get_config()
    config.data.validation_fraction, config.eval.choose_on_test = fraction, on_test
    split = "validation" if fraction else "test"
    expected = ("2", f"search mAP on the {split} split")
    if not (fraction or on_test):
        expected = ("3", "being the last")
    folder, by = chosen_step(saved, config)
    assert (folder.name, by) == expected
    assert chosen_step(folder) == (folder, "hand")
    assert chosen_step(saved)[0].name == "2"  # as its own configuration says


def test_configurations(saved, tmp_path):
    loaded = load_config(saved)
    assert loaded.to_dict() == CONFIG.to_dict()
    assert loaded.is_locked
    loaded.data.prepared_dir = "somewhere"  # unset in the config: stays open
    assert load_run_config(saved).to_dict() == CONFIG.to_dict()  # of a run without config.json
    write_run_info(tmp_path, loaded)
    assert load_run_config(tmp_path).to_dict() == loaded.to_dict()
    versions = package_versions()
    assert versions["jax"] == jax.__version__
    assert "not installed" not in versions.values()


def test_damage_is_found_or_does_not_matter(saved, tmp_path):
    original, folder = saved / "checkpoints" / "2", tmp_path / "checkpoints" / "2"
    refused = collections.defaultdict(list)
    for file in sorted(path for path in original.rglob("*") if path.is_file()):
        content, name = file.read_bytes(), file.relative_to(original)
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 4]) if content else b"x"
        cut = content[:middle]
        for damaged in (None, cut, cut + flipped + content[middle + 1 :]):  # None: gone
            shutil.copytree(original, folder)
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            try:
                with open_checkpoints(tmp_path) as checkpoints:
                    restored, iterator_state = checkpoints.restore(make_state(0))
                weights = load_weights(tmp_path, make_state(0))
            except (UserError, FileNotFoundError) as error:  # the system names the file itself
                refused[name.parts[0]].append(str(error))
            else:
                assert_same(restored, make_state(2))
                assert_same(weights.params, restored.params)
                assert iterator_state == {"position": 2} or damaged is not None
            shutil.rmtree(folder)
    assert refused["manifest"]
    # A flipped bit in the values, over which Orbax has no checksum.
    assert any("wrong checksum of frozen/large" in message for message in refused["arrays"])
    messages = [message for item in refused.values() for message in item]
    assert all(str(tmp_path) in message and message.isprintable() for message in messages)


STALE = OSError(errno.ESTALE, "Stale file handle")
HIDDEN = ValueError("Failed to read: Stale [os_error_code='116']")


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (STALE, None, STALE),
        (MemoryError("full"), None, MemoryError("full")),
        (RuntimeError("Orbax"), STALE, OSError(errno.ESTALE, "Stale file handle", "/c/1")),
        (RuntimeError("Orbax"), HIDDEN, OSError(errno.ESTALE, "Stale file handle", "/c/1")),
        (RuntimeError("a\nb"), None, UserError("/c/1: damaged checkpoint (RuntimeError: a b)")),
    ],
)
def test_what_the_system_says_is_no_damage(error, cause, expected):
    error.__cause__ = cause
    with pytest.raises(type(expected)) as caught, reading(Path("/c/1")):
        raise error
    assert str(caught.value) == str(expected)


def test_a_half_deleted_old_checkpoint_is_cleared_away(copied):
    """What is left when the kill comes while an old checkpoint is being removed."""
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest/metadata"):
        (copied / "checkpoints" / "1" / name).unlink()
    with open_checkpoints(copied) as checkpoints:
        assert (checkpoints.latest_step(), best_step(copied)) == (3, 2)
        checkpoints.save(make_state(4), None)
        checkpoints.save(make_state(5), None)
    assert steps_in(copied) == ["2", "4", "5"]


def test_files_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    fsync, rename, synced, late = os.fsync, os.rename, set(), []

    def seen_fsync(file):
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def seen_rename(source, target, **options):
        files = [path for path in Path(source).rglob("*") if path.is_file()]
        late.append({path.name for path in files if path.stat().st_ino not in synced})
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"position": 1}, score=0.5)
    assert len(synced) > 8
    # The last marker of Orbax, which nobody reads, comes after them.
    assert late[-1] <= {"commit_success.txt", "_CHECKPOINT_METADATA"}


def start(child: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.checkpoint.store_test", child, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **streams)


def kill_after(process: subprocess.Popen, line: str, seconds: float = 0.0, times: int = 1) -> None:
    """Kills a child so long after it printed this line so many times."""
    read = []
    while read.count(line) < times:
        read.append(process.stdout.readline().strip())
        assert read[-1] or process.poll() is None, "\n".join(read)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def child_train(workdir: str, stop: str) -> None:
    """Goes on from the last checkpoint, and waits before it renames a folder `stop`..."""
    rename = os.rename

    def stopping_rename(source, target, **options):
        if Path(source).name.startswith(stop):
            print("renaming", flush=True)
            time.sleep(600)
        return rename(source, target, **options)

    os.rename = stopping_rename
    folder = Path(workdir)
    with one_writer(folder):
        step = restored_step(folder) if (folder / "checkpoints").exists() else 0
        with open_checkpoints(folder) as checkpoints:
            while True:
                step += 1
                checkpoints.save(make_state(step), {"position": step}, score=float(step % 7))
                print("saving", flush=True)


def test_kill_while_saving(tmp_path):
    kill_after(start("train", tmp_path, "2."), "renaming")
    (leftover,) = (name for name in steps_in(tmp_path) if not name.isdigit())
    assert leftover.startswith("2.")
    steps, chance = [1], random.Random(0)
    for _ in range(2):
        # A second save begins when the first is complete.
        kill_after(start("train", tmp_path, "never"), "saving", 0.3 * chance.random(), times=2)
        steps.append(max(int(name) for name in steps_in(tmp_path) if name.isdigit()))
    assert restored_step(tmp_path) == steps[-1] == max(steps) > 1
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(steps[-1] + 1), None)
    assert all(name.isdigit() for name in steps_in(tmp_path))


def child_run(workdir: str, port: str, count: str, index: str) -> None:
    """One of the processes of a run: saves 1, then more than files may hold, then 3."""
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    mesh = jax.sharding.Mesh(jax.devices(), "i")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    limit, (_, most) = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_checkpoints(Path(workdir), keep=1) as checkpoints:
        checkpoints.save(make_state(1), {"position": 1}, score=0.5)
        checkpoints.wait()
        resource.setrlimit(limit, (1000, most))
        try:
            checkpoints.save(make_state(2), {"position": 2})
            checkpoints.wait()
        except UserError as error:
            print(f"{error}\n", end="", flush=True)  # in one piece among other threads
        resource.setrlimit(limit, (most, most))
        state = jax.device_get(make_state(3))
        state = state.replace(memory=jax.device_put(state.memory, everywhere))
        assert state.memory.lut.is_fully_addressable == (count == "1")
        checkpoints.save(state, {"position": 3})
        assert (checkpoints.latest_step(), checkpoints.has_score(3)) == (3, False)
        checkpoints.save(state, None, score=0.4)
        assert checkpoints.has_score(3)
        assert_same(checkpoints.restore(make_state(0))[0], make_state(3))


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, count):
    """With a limit on the size of files, which the system reports as it does a full disk."""
    port = free_port()
    processes = [start("run", tmp_path, port, count, index) for index in range(count)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, outputs
    assert (
        f"{tmp_path}/checkpoints: cannot be written (File too large); complete checkpoints stay, "
        "and the same command resumes from the last one\n"
    ) in outputs[0]  # TensorStore may say more
    assert [name for name in steps_in(tmp_path) if name.isdigit()] == ["1", "3"]
    assert (best_step(tmp_path), restored_step(tmp_path)) == (1, 3)


if __name__ == "__main__":
    globals()[f"child_{sys.argv[1]}"](*sys.argv[2:])
