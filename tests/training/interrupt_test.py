"""Requests to stop, by real signals to forked processes whose main thread may not listen."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from alignps_jax.training.interrupt import Interrupt
from alignps_jax.training.writer import Writer
from alignps_jax.types import UserError

# Some test of the same process may have started JAX's threads; the children use none of them.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*os\.fork")


class Child:
    """A forked process that runs a function and leaves with its exit code."""

    def __init__(
        self,
        work: Callable[[Interrupt], None],
        workdir: Path,
        before: Callable[[], object] = lambda: None,
        several: bool = False,
    ):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(writing, 1)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            code = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                before()
                writer = Writer(workdir, lambda: print("released"), several)
                with Interrupt(writer) as interrupt:
                    work(interrupt)
                code = 0
            except SystemExit as leaving:
                code = leaving.code
            except KeyboardInterrupt:
                print("KeyboardInterrupt")
            finally:
                os._exit(code)
        os.close(writing)
        self._output = os.fdopen(reading)

    def wait_for(self, line: str) -> None:
        while (found := self._output.readline().strip()) != line:
            assert found, "the process ended"

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, list[str], float]:
        """Exit code, the rest of its output, and the seconds that it took to end."""
        start = time.monotonic()
        output = self._output.read().splitlines()
        self._output.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), output, time.monotonic() - start


def compile_something() -> None:
    """Minutes in C, where no Python handler of a signal runs, as in XLA's compiler."""
    print("ready")
    hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)


def saved() -> str:
    return "step 7 is saved"


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_it_leaves_out_of_a_compiler_within_seconds(tmp_path, number, code, name):
    def work(interrupt):
        interrupt.idle(saved)
        compile_something()

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(number)
    found, output, seconds = child.end()
    assert (found, output) == (code, [f"{name}: step 7 is saved", "released"])
    assert seconds < 5


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_busy_loop_is_asked_to_save_first(tmp_path, number, code, name):
    def work(interrupt):
        interrupt.busy()
        print("ready")
        while not interrupt.wanted(3):
            time.sleep(0.01)
        interrupt.stop("saved")

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(number)
    found, output, _ = child.end()
    said = f"{name}: saving after this step; Ctrl-C again exits at once"
    assert (found, output) == (code, [said, f"{name}: saved"])


def test_a_request_that_came_while_busy_is_heeded_once_there_is_time(tmp_path):
    def work(interrupt):
        interrupt.busy()
        print("ready")
        while not interrupt.wanted(3):
            time.sleep(0.01)
        interrupt.idle(saved)
        print("not reached")

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(signal.SIGTERM)
    code, output, _ = child.end()
    assert (code, output[1:]) == (143, ["SIGTERM: step 7 is saved", "released"])


def test_a_busy_loop_does_not_wait_for_what_comes_after_the_request(tmp_path):
    def work(interrupt):
        interrupt.busy()
        done = Future()
        done.set_result(None)
        assert not interrupt.wanted_before(done)
        print("ready")
        assert interrupt.wanted_before(Future())
        interrupt.stop("saved")

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(signal.SIGTERM)
    code, output, seconds = child.end()
    assert (code, output[1:]) == (143, ["SIGTERM: saved"])
    assert seconds < 5


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("state", ["busy", "saving"])
def test_a_second_ctrl_c_exits_at_once(tmp_path, first, state):
    def endless() -> str:
        print("saving")
        time.sleep(60)
        return ""

    def work(interrupt):
        if state == "busy":
            interrupt.busy()
        else:
            interrupt.idle(endless)
        compile_something()

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(first)
    if state == "saving":
        child.wait_for("saving")
    else:
        time.sleep(0.2)
        child.send(signal.SIGTERM)  # queues send it more than once
        time.sleep(0.2)
    child.send(signal.SIGINT)
    code, output, seconds = child.end()
    assert (code, output[-1]) == (130, "released")
    assert seconds < 5


def test_while_another_thread_ends_the_process_the_main_one_does_nothing(tmp_path):
    def slow() -> str:
        print("saving")
        time.sleep(0.5)
        return "done"

    def work(interrupt):
        interrupt.idle(slow)
        print("ready")
        time.sleep(0.2)
        interrupt.busy()
        print("not reached")

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(signal.SIGTERM)
    assert child.end()[:2] == (143, ["saving", "SIGTERM: done", "released"])


def test_what_cannot_be_saved_is_an_error(tmp_path):
    def fail() -> str:
        raise UserError("checkpoints: cannot be written (No space left on device)")

    def work(interrupt):
        interrupt.idle(fail)
        compile_something()

    child = Child(work, tmp_path)
    child.wait_for("ready")
    child.send(signal.SIGTERM)
    code, output, _ = child.end()
    assert code == 2
    assert output[0] == "error: checkpoints: cannot be written (No space left on device)"


def test_ignored_signals_stay_ignored(tmp_path):
    def work(interrupt):
        print("ready")
        time.sleep(0.5)

    child = Child(work, tmp_path, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    child.wait_for("ready")
    child.send(signal.SIGINT)
    assert child.end()[:2] == (0, [])


def test_other_modes_get_their_handlers_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt(Writer(tmp_path, lambda: None, several=False)) as interrupt:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert not interrupt.wanted(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1


def test_several_processes_hear_of_one_anothers_signals(tmp_path):
    def work(interrupt):
        compile_something()

    children = [Child(work, tmp_path, several=True) for _ in range(2)]
    for child in children:
        child.wait_for("ready")
    children[0].send(signal.SIGTERM)
    assert [child.end()[0] for child in children] == [143, 143]
