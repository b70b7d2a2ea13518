"""A request to stop while processes of one run wait for their programs: all stop, or none."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from alignps_jax.training.interrupt import Interrupt
from alignps_jax.training.writer import Writer
from tests.pairs import outputs_of, run_one, start_pair


def child(index: int, workdir: str) -> int:
    """Waits for a program that one of them gets late, then for one that nobody gets."""
    with Interrupt(Writer(Path(workdir), lambda: None, several=True)) as interrupt:
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
    pair = start_pair(__name__, str(tmp_path))
    while (line := pair[0].stdout.readline()) != "waited True\n":  # for the other one
        assert line, "process 0 ended"
    pair[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    outputs = outputs_of(pair, code=143)
    assert time.monotonic() - start < 20
    for output in outputs:
        assert output.splitlines()[-1] == "SIGTERM: saved"


if __name__ == "__main__":
    run_one(child)
