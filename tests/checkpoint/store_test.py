"""Checkpoints: exact, complete after any kill, and refused where they are damaged or do not fit.

Run as a program (`python -m tests.checkpoint.store_test <child> ...`) this file is the process
that the tests kill, or that runs on several devices.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from alignps_jax.checkpoint.arrays import reading
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
from alignps_jax.types import OIMMemory, TrainState, UserError, Weights
from configs.cuhk import get_config
from tests.places import ROOT

CONFIG = ConfigDict(
    {
        "model": {"stages": (3, 4), "nested": ((1, 2), (3, 4)), "unset": None},
        "data": {"validation_fraction": 0.25},  # the best step is the one that counts
        "eval": {"choose_on_test": False},
    }
).lock()


def make_state(step: int, queue: int = 5) -> TrainState:
    """A state that depends on `step` everywhere, with every kind of leaf and node we meet."""
    rng = np.random.default_rng(step)
    params = {
        "neck": {"lateral3": {"kernel": rng.normal(size=(3, 2, 5)).astype(np.float32)}},
        "head": {"scale": jnp.bfloat16(rng.normal()), "bias": jnp.array([np.nan, -0.0, np.inf])},
        "nothing": {},
    }
    params = jax.tree.map(jnp.asarray, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(35.0),
        optax.masked(optax.add_decayed_weights(0.1), {"neck": True, "head": False, "nothing": {}}),
        optax.adam(optax.constant_schedule(0.1)),
    )
    return TrainState(
        step=jnp.int32(step),
        params=params,
        frozen={
            "statistics": (jnp.arange(6, dtype=jnp.uint32) + step, jnp.array([True, False])),
            "large": jnp.asarray(rng.normal(size=(100, 100)), jnp.float32),
        },
        opt_state=optimizer.init(params),
        memory=OIMMemory(
            lut=jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
            queue=jnp.asarray(rng.normal(size=(queue, 4)), jnp.float32),
            tail=jnp.int32(step % 5),
        ),
    )


def as_bytes(tree) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert as_bytes(found) == as_bytes(expected)


def open_checkpoints(workdir: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(workdir, keep=keep, config=CONFIG)


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
@pytest.mark.parametrize("abstract", [True, False])
def test_round_trip_is_exact(tmp_path, queue, abstract):
    state = make_state(4, queue)
    template = jax.eval_shape(lambda: state) if abstract else make_state(1, queue)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"position": [1, {"a": None}]})
        restored, iterator_state = checkpoints.restore(template)
    assert_same(restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert iterator_state == {"position": [1, {"a": None}]}


def test_the_next_step_may_take_the_buffers_and_the_iterator_state(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {f"w{i}": jnp.full((200, 200), i, jnp.float32) for i in range(50)}
    host, position = np.ones((300, 300), np.float32), {"position": [1]}
    state = make_state(1).replace(params=params, frozen={"host": host})
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, position)
        host[:] = position["position"][0] = -1
        for _ in range(5):
            params = add(params)
        restored, iterator_state = checkpoints.restore(state.replace(params=params))
        doubled = add(add(restored.params))
    assert iterator_state == {"position": [1]}
    assert (restored.frozen["host"] == 1).all()
    assert all((doubled[f"w{i}"] == i + 2).all() for i in range(50))


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
    state = make_state(0)
    kernel = {"neck": {"lateral3": {"kernel": jnp.zeros((3, 3, 5))}}}
    cases = {
        "params/neck/lateral3/kernel: found float32[3, 2, 5], expected float32[3, 3, 5]": (
            state.replace(params=state.params | kernel)
        ),
        "params/new/bias: found nothing, expected bfloat16[2]": (
            state.replace(params=state.params | {"new": {"bias": jnp.zeros(2, jnp.bfloat16)}})
        ),
        "memory/queue: found float32[5, 4], expected float32[0, 4]": make_state(0, queue=0),
        "step: found int32[], expected uint32[]": state.replace(step=jnp.uint32(0)),
        "params/head/scale: found bfloat16[], expected nothing; params/neck": (
            state.replace(params={}, opt_state=())
        ),
    }
    with open_checkpoints(saved, keep=3) as checkpoints:
        for message, template in cases.items():
            with pytest.raises(UserError) as error:
                checkpoints.restore(template)
            assert str(error.value).startswith(f"{saved}/checkpoints/3: does not fit: ")
            assert message in str(error.value)
            assert "\n" not in str(error.value)
    assert "; and " in str(error.value)
    assert "opt_state" not in str(error.value)


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


def test_configurations(tmp_path):
    config = get_config()
    config.model.channels = 77
    with Checkpoints(tmp_path, keep=1, config=config) as checkpoints:
        checkpoints.save(make_state(1), None)
    loaded = load_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.is_locked
    loaded.data.prepared_dir = "somewhere"  # unset in the config: stays open
    write_run_info(tmp_path, config)
    assert load_run_config(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == config.seed
    versions = package_versions()
    assert versions["jax"] == jax.__version__
    assert "not installed" not in versions.values()


def damaged_files(original: Path) -> Iterator[tuple[Path, bytes | None]]:
    """A file of a checkpoint, and its content then: cut off, one bit flipped, or gone."""
    for file in sorted(path for path in original.rglob("*") if path.is_file()):
        content, name = file.read_bytes(), file.relative_to(original)
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 4]) if content else b"x"
        yield name, None
        yield name, content[:middle]
        yield name, content[:middle] + flipped + content[middle + 1 :]


def test_damage_is_found_or_does_not_matter(saved, tmp_path):
    original, refused = saved / "checkpoints" / "2", {}
    folder = tmp_path / "checkpoints" / "2"
    for name, content in damaged_files(original):
        shutil.copytree(original, folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        try:
            with open_checkpoints(tmp_path) as checkpoints:
                restored, iterator_state = checkpoints.restore(make_state(0))
            weights = load_weights(tmp_path, make_state(0))
        except (UserError, FileNotFoundError) as error:  # the system names the file itself
            refused[name.parts[0], str(error)] = str(tmp_path) in str(error)
        else:
            assert_same(restored, make_state(2))
            assert_same(weights.params, restored.params)
            assert iterator_state == {"position": 2} or content is not None
        shutil.rmtree(folder)
    assert {"arrays", "manifest"} <= {item for item, _ in refused}
    # A flipped bit in the values, over which Orbax has no checksum.
    assert any("wrong checksum of frozen/large" in m for item, m in refused if item == "arrays")
    assert all(named and message.isprintable() for (_, message), named in refused.items())


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


def start(child: str, *arguments: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.checkpoint.store_test", child, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def start_together(child: str, workdir: Path, count: int) -> list[subprocess.Popen]:
    """Processes of one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [start(child, workdir, port, count, index) for index in range(count)]


def join(port: str, count: str, index: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))


def kill_after(process: subprocess.Popen, line: str, seconds: float = 0.0, times: int = 1) -> None:
    """Kills a child so long after it printed this line so many times."""
    read = []
    while read.count(line) < times:
        read.append(process.stdout.readline().strip())
        assert read[-1] or process.poll() is None, "\n".join(read)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def outputs_of(*processes: subprocess.Popen) -> list[str]:
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def many_arrays(step: int) -> TrainState:
    params = {f"w{i}": np.full((10, 10), 1000 * step + i, np.float32) for i in range(150)}
    lut, queue = np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32)
    memory = OIMMemory(lut, queue, np.int32(step))
    return TrainState(np.int32(step), params, {}, (), memory)


def child_stall(workdir: str) -> None:
    """Saves 1 whole, and stops in 2 just before it is renamed."""

    def stall(source: Path) -> None:
        if Path(source).name.startswith("2."):
            print("committing", flush=True)
            time.sleep(600)

    before_renaming(stall)
    with open_checkpoints(Path(workdir)) as checkpoints:
        checkpoints.save(many_arrays(1), {"position": 1}, score=0.5)
        checkpoints.save(many_arrays(2), {"position": 2}, score=0.9)


def before_renaming(act: Callable[[Path], None]) -> None:
    rename = os.rename

    def acting_rename(source, target, **options):
        act(source)
        return rename(source, target, **options)

    os.rename = acting_rename


def child_train(workdir: str) -> None:
    """Goes on from the last checkpoint and saves as fast as it can, until killed."""
    with open_checkpoints(Path(workdir)) as checkpoints:
        state, iterator_state = checkpoints.restore(many_arrays(0))
        step = int(state.step)
        assert_same(state, many_arrays(step))
        assert iterator_state == {"position": step}
        while True:
            step += 1
            checkpoints.save(many_arrays(step), {"position": step}, score=float(step % 7))
            print("saving", flush=True)


def test_kill_while_saving(tmp_path):
    kill_after(start("stall", tmp_path), "committing")
    leftovers = [name for name in steps_in(tmp_path) if not name.isdigit()]
    assert len(leftovers) == 1
    assert leftovers[0].startswith("2.")
    steps, chance = [1], random.Random(0)
    for _ in range(2):
        # A second save begins when the first is complete.
        kill_after(start("train", tmp_path), "saving", 0.3 * chance.random(), times=2)
        steps.append(max(int(name) for name in steps_in(tmp_path) if name.isdigit()))
    assert steps == sorted(steps)
    assert steps[-1] > 1
    with open_checkpoints(tmp_path) as checkpoints:
        state, iterator_state = checkpoints.restore(many_arrays(0))
        assert_same(state, many_arrays(steps[-1]))
        assert iterator_state == {"position": steps[-1]}
        checkpoints.save(many_arrays(steps[-1] + 1), None)
    assert all(name.isdigit() for name in steps_in(tmp_path))


def child_full(workdir: str, *cluster: str) -> None:
    """Saves 1, then more than files may hold, then 3."""
    join(*cluster)
    limit = resource.RLIMIT_FSIZE
    with open_checkpoints(Path(workdir)) as checkpoints:
        checkpoints.save(many_arrays(1), {"position": 1}, score=0.5)
        checkpoints.wait()
        resource.setrlimit(limit, (1000, resource.getrlimit(limit)[1]))
        try:
            checkpoints.save(many_arrays(2), {"position": 2})
            checkpoints.wait()
        except UserError as error:
            print(error)
        resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
        checkpoints.save(many_arrays(3), {"position": 3})


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, processes):
    """With a limit on the size of files, which the system reports as it does a full disk."""
    assert outputs_of(*start_together("full", tmp_path, processes))[0] == (
        f"{tmp_path}/checkpoints: cannot be written (File too large); complete checkpoints stay, "
        "and the same command resumes from the last one\n"
    )
    assert [name for name in steps_in(tmp_path) if name.isdigit()] == ["1", "3"]


def child_synced(workdir: str) -> None:
    """Says which files a checkpoint has on the disk when it gets its name, and which it has not."""
    fsync, synced = os.fsync, set()

    def seen_fsync(file):
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def tell(source: Path) -> None:
        if Path(source).name.startswith("1."):
            files = [path for path in Path(source).rglob("*") if path.is_file()]
            print(len(files), *(path.name for path in files if path.stat().st_ino not in synced))

    os.fsync = seen_fsync
    before_renaming(tell)
    with open_checkpoints(Path(workdir)) as checkpoints:
        checkpoints.save(make_state(1), {"position": 1}, score=0.5)


def test_files_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path):
    (output,) = outputs_of(start("synced", tmp_path))
    count, *late = output.split()
    assert int(count) > 8
    # The last marker of Orbax, which nobody reads, comes after them.
    assert set(late) <= {"commit_success.txt", "_CHECKPOINT_METADATA"}


def child_devices(workdir: str) -> None:
    """A state as pmap leaves it on four devices; whatever is printed here is Orbax's noise."""
    assert jax.local_device_count() == 4
    step = jax.pmap(lambda s, x: s, "i", in_axes=(None, 0), out_axes=None, donate_argnums=0)
    with open_checkpoints(Path(workdir)) as checkpoints:
        for number in (1, 2, 3):
            state = step(make_state(number), np.zeros(4))
            assert len(state.params["head"]["bias"].devices()) == 4
            checkpoints.save(state, {"position": number}, score=0.5 if number == 2 else None)
        restored, _ = checkpoints.restore(state)
        assert_same(step(restored, np.zeros(4)), make_state(3))
        weights = Weights(state.step, state.params, state.frozen)
    assert_same(load_weights(Path(workdir), weights).params, make_state(2).params)


def test_from_four_devices_to_one_without_a_word(tmp_path):
    four = "--xla_force_host_platform_device_count=4"
    assert outputs_of(start("devices", tmp_path, XLA_FLAGS=four)) == [""]
    with open_checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(make_state(0))
    assert_same(restored, make_state(3))


def child_process(workdir: str, *cluster: str) -> None:
    """One of two processes, with a state that is replicated over both."""
    join(*cluster)
    mesh = jax.sharding.Mesh(jax.devices(), "i")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with open_checkpoints(Path(workdir), keep=1) as checkpoints:
        for step in (1, 2, 3):
            state = many_arrays(step)
            if step == 3:
                state = state.replace(memory=jax.device_put(state.memory, everywhere))
                assert not state.memory.lut.is_fully_addressable
            checkpoints.save(state, {"position": step}, score=0.5 if step == 1 else None)
        assert (checkpoints.latest_step(), checkpoints.has_score(3)) == (3, False)
        checkpoints.save(state, None, score=0.6)
        assert checkpoints.has_score(3)
        restored, iterator_state = checkpoints.restore(many_arrays(0))
    assert_same(restored, many_arrays(3))
    assert iterator_state == {"position": 3}


def test_two_processes(tmp_path):
    outputs_of(*start_together("process", tmp_path, 2))
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        restored, iterator_state = checkpoints.restore(many_arrays(0))
    assert_same(restored, many_arrays(3))
    assert iterator_state == {"position": 3}


if __name__ == "__main__":
    globals()[f"child_{sys.argv[1]}"](*sys.argv[2:])
