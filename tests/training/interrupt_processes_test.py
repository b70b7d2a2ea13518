"""A request to stop while processes of one run wait for their programs: all stop, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from alignps_jax import peers
from alignps_jax.training.interrupt import Interrupt
from alignps_jax.training.writer import Writer
from tests.places import ROOT, free_port


def child(index: int, workdir: Path) -> int:
    """Waits for a program that one of them gets late, then for one that nobody gets."""
    with Interrupt(Writer(workdir, lambda: None, several=True)) as interrupt:
        interrupt.busy()
        late: Future[None] = Future()
        threading.Timer(2.0 * index, late.set_result, [None]).start()
        start = time.monotonic()
        assert not interrupt.wanted_before(late)
        assert late.done()
        print(f"waited {time.monotonic() - start > 1.5}", flush=True)
        assert interrupt.wanted_before(Future())
        interrupt.stop("saved")


def test_they_wait_for_the_last_and_stop_together(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(index), str(port), str(tmp_path)],
            cwd=ROOT,
            env=os.environ.copy(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    while (line := processes[0].stdout.readline()) != "waited True\n":  # for the other one
        assert line, "process 0 ended"
    processes[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    assert time.monotonic() - start < 20
    for output in outputs:
        assert output.splitlines()[-1] == "SIGTERM: saved"


if __name__ == "__main__":
    number, port, folder = sys.argv[1:]
    peers.join(f"127.0.0.1:{port}", 2, int(number))
    peers.end(peers.end_together(lambda: child(int(number), Path(folder))))
