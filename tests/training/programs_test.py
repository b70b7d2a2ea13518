"""Programs are compiled once, before the steps that need them, and beside those that do not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alignps_jax.devices import (
    AXIS,
    PARALLEL,
    compile_step,
    parallel_train_step,
    replicate,
    split_over_devices,
)
from alignps_jax.training.programs import Programs
from configs import tiny
from tests.fakes import random_batch, train_setup
from tests.pairs import outputs_of, run_one, start_pair
from tests.places import ROOT

A, B, C = (96, 128), (128, 96), (192, 256)


class Compiler:
    """Compiles nothing; each size waits for its turn to end."""

    def __init__(self, *held):
        self.begun, self.said = [], []
        self._turns = {size: threading.Event() for size in held}

    def __call__(self, size):
        self.begun.append(size)
        if size in self._turns:
            assert self._turns[size].wait(30)

    def end(self, size):
        self._turns[size].set()

    def programs(self, order):
        return Programs(self, order, lambda size, count: self.said.append((size, count)))


def until(found):
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_next_needed_is_compiled_while_the_first_trains_and_each_once():
    compiler = Compiler(B)
    with compiler.programs([A, A, B, A, C, B]) as programs:
        programs.program(A).result(30)  # it trains
        until(lambda: compiler.begun == [A, B])
        second = programs.program(B)
        assert not second.done()
        compiler.end(B)
        second.result(30)
        programs.program(C).result(30)
        assert programs.program(B) is second
    assert compiler.begun == [A, B, C]
    assert compiler.said == [(A, 1), (B, 2), (C, 3)]


def test_what_was_not_planned_comes_next():
    compiler = Compiler(A)
    with compiler.programs([A, B]) as programs:
        until(lambda: compiler.begun == [A])
        asked = programs.program(C)
        compiler.end(A)
        asked.result(30)
        programs.program(B).result(30)
        later = (1, 1)  # the thread has nothing to do, and waits
        programs.program(later).result(30)
    assert compiler.begun == [A, C, B, later]


def test_without_steps_nothing_is_compiled():
    compiler = Compiler()
    with compiler.programs([]):
        pass
    assert compiler.begun == []


def test_once_it_is_left_no_other_is_begun():
    compiler = Compiler(A)
    with compiler.programs([A, B]) as programs:
        until(lambda: compiler.begun == [A])
    compiler.end(A)
    programs.program(A).result(30)
    until(lambda: not any(thread.name == "programs" for thread in threading.enumerate()))
    assert compiler.begun == [A]


def refuse(size):
    if size == B:
        raise MemoryError("too large")


def unplannable():
    yield A
    raise MemoryError("too large")


@pytest.mark.parametrize(("build", "order"), [(refuse, [A, B, C]), (lambda _: None, unplannable())])
def test_a_failure_ends_those_that_wait_and_those_that_ask_next(build, order):
    with Programs(build, order, lambda size, count: None) as programs:

        def failed():
            try:
                programs.program(A)
            except MemoryError:
                return True
            return False

        until(failed)
        with pytest.raises(MemoryError, match="too large"):
            programs.program(C)


def test_a_failure_ends_who_waits_for_another_one():
    compiler = Compiler(A)

    def build(size):
        compiler(size)
        raise MemoryError("too large")

    with Programs(build, [A, B], lambda size, count: None) as programs:
        waiting = programs.program(B)
        compiler.end(A)
        with pytest.raises(MemoryError, match="too large"):
            waiting.result(30)


def listen() -> list[str]:
    """What XLA compiles from now on; JAX's listeners stay for good."""
    names: list[str] = []

    def note(event, seconds, **about):
        if event.endswith("/backend_compile_duration"):
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(note)
    return names


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    return listen()


@pytest.mark.parametrize("way", PARALLEL)
def test_a_step_that_was_compiled_ahead_compiles_nothing(way, compiled):
    count = jax.device_count()
    _, step, start = train_setup(tiny.get_config(), devices=count)
    parallel = parallel_train_step(step, way)
    state = replicate(jax.tree.map(jnp.copy, start))
    types = jax.tree.map(jax.typeof, state)
    batch = split_over_devices(random_batch(np.random.default_rng(0), images=count), count)

    def build(size):
        compile_step(parallel, types, jax.tree.map(jax.typeof, batch))

    with Programs(build, [A], lambda size, number: None) as programs:
        programs.program(A).result()
    ahead = len(compiled)
    assert ahead >= 1
    for _ in range(2):
        state, metrics = parallel(state, batch)
        assert np.isfinite(jax.device_get(metrics.grad_norm))
    assert compiled[ahead:] == []


def test_the_process_ends_although_a_program_is_under_way():
    code = (
        "import time\n"
        "from alignps_jax.peers import end\n"
        "from alignps_jax.training.programs import Programs\n"
        "with Programs(lambda size: time.sleep(600), [(1, 1)], lambda *_: None):\n"
        "    time.sleep(0.5)\n"
        "print('saved')\n"
        "end(143)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (143, "saved\n"), done.stderr


def child(index: int, way: str) -> int:
    """One process of a run with two devices each: compiles ahead, then calls."""

    def step(state, batch):
        total = lax.psum(batch["x"].sum(), AXIS)
        return {"w": state["w"] + total}, total

    parallel = parallel_train_step(step, way)
    state = replicate({"w": jnp.zeros(3)})
    batches = [{"x": np.ones((2, 1, width), np.float32)} for width in (5, 7)]
    types = jax.tree.map(jax.typeof, state)
    for batch in batches:
        compile_step(parallel, types, jax.tree.map(jax.typeof, batch))
    names = listen()
    for batch in (*batches, *batches):
        state, total = parallel(state, batch)
    print(float(total), jax.device_get(state["w"]).tolist(), names)
    return 0


@pytest.mark.parametrize("way", PARALLEL)
def test_it_compiles_nothing_in_several_processes_either(way):
    outputs = outputs_of(start_pair(__name__, way, devices=2))
    # Four devices, each with as many ones as a batch is wide.
    found = [output.splitlines()[-1] for output in outputs]  # gloo says something before
    assert found == ["28.0 [96.0, 96.0, 96.0] []"] * 2


if __name__ == "__main__":
    run_one(child)
