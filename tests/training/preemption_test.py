"""Requests to stop a run of one process; `multi_process_test` has those of several."""

import os
import signal
import subprocess
import sys
import time

import pytest

from alignps_jax.training.preemption import Preemption
from tests.places import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def heeded():
    """Signals as a terminal leaves them, whatever the tests were started from."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_request_is_noted_until_the_loop_asks(number, code, capfd):
    stopped = pytest.raises(SystemExit, match=str(code))  # also by one after the last step
    with stopped, Preemption() as preemption:
        assert preemption.exit_code(1) is None
        os.kill(os.getpid(), number)
        assert preemption.exit_code(2) == code
        os.kill(os.getpid(), signal.SIGTERM)  # queues send it more than once
        assert preemption.exit_code(3) == code
    assert "Ctrl-C again exits at once" in capfd.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # a shell's "&", nohup
def test_ignored_signals_stay_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with Preemption() as preemption:
        os.kill(os.getpid(), number)
        assert preemption.exit_code(1) is None
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_ctrl_c_after_a_request_exits_at_once(first):
    code = f"""if True:
        import os, signal, time
        from alignps_jax.training.preemption import Preemption
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Preemption():
            os.kill(os.getpid(), signal.{first})
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(30) == 130
    assert time.monotonic() - start < 5
