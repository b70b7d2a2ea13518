"""Requests to stop: SIGTERM and Ctrl-C are noticed at once, whatever the main thread is doing.

Python runs its signal handlers in the main thread between two of its own instructions, which XLA's
compiler keeps waiting for minutes. So a thread of ours waits for the bytes that Python's C code
writes at each signal (`signal.set_wakeup_fd`), and ends the process itself while nothing can be
lost. While something can, the training loop asks after each step.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NoReturn

import numpy as np
from jax.experimental import multihost_utils

from alignps_jax.peers import leave
from alignps_jax.training.writer import Writer
from alignps_jax.types import UserError

_NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
_POLL = 1.0  # seconds between two looks for what another process noticed
_CLOSE = 0  # no signal has this number


class Interrupt:
    """Ends the run after SIGTERM (exit code 143) or Ctrl-C (130); a context manager.

    A second Ctrl-C ends it at once, without saving. Several processes of one run learn of a signal
    to any of them by a file in their shared workdir, and stop after the same step.
    """

    # In a multi-process run all processes must agree on the step after which they stop.
    AGREE_EVERY = 10

    def __init__(self, writer: Writer):
        self._writer = writer
        self._signal: int | None = None
        self._finish: Callable[[], str] | None = None
        self._leaving = False
        self._mutex = threading.Lock()
        self._noticing = threading.Lock()

    def __enter__(self) -> Interrupt:
        self.idle(lambda: "nothing is lost; the same command starts again")
        self._bytes, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        # Ignored signals (of a shell's background jobs, or nohup) stay ignored.
        heeded = [number for number in _NAMES if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, lambda *_: None) for number in heeded}
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.write(self._wakeup, bytes([_CLOSE]))
        self._watcher.join()
        os.close(self._wakeup)
        os.close(self._bytes)
        self._wait_if_leaving()

    def idle(self, finish: Callable[[], str]) -> None:
        """From now on a request ends the process at once.

        `finish` is called first, in another thread; it writes what is not written yet, and returns
        what there is to say.
        """
        self._wait_if_leaving()
        with self._mutex:
            self._finish = finish
            leave = self._leaving = self._signal is not None
        if leave:
            self._leave(finish)

    def busy(self) -> None:
        """From now on a request waits until the loop asks whether one is `wanted`."""
        with self._mutex:
            self._finish = None
        self._wait_if_leaving()

    def wanted(self, step: int) -> bool:
        """Whether to stop after this step; the same in all processes."""
        if not self._writer.several:
            return self._signal is not None
        if step % self.AGREE_EVERY:
            return False
        # A request that comes after this is not seen by the others: it waits for the next time.
        seen = int(multihost_utils.process_allgather(np.array(self._signal or 0)).max())
        self._signal = self._signal or seen or None
        return bool(seen)

    def wanted_before(self, done: Future[Any]) -> bool:
        """Waits for `done` in all processes; whether to stop, because a request came before.

        All processes call it, and it is the same in all.
        """
        while True:
            wait([done], timeout=_POLL / 4)
            seen, through = self._signal or 0, done.done()
            if self._writer.several:
                all_of_them = multihost_utils.process_allgather(np.array([seen, through]))
                seen, through = int(all_of_them[:, 0].max()), bool(all_of_them[:, 1].all())
            self._signal = self._signal or seen or None
            if seen or through:
                return bool(seen)

    def stop(self, message: str) -> NoReturn:
        """Leaves the run from the main thread, once all is saved.

        Raises:
          SystemExit: always, with the exit code of the signal.
        """
        assert self._signal is not None
        self._say(message)
        raise SystemExit(128 + self._signal)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select(
                [self._bytes], [], [], _POLL if self._writer.several else None
            )
            number = os.read(self._bytes, 1)[0] if ready else self._writer.noticed_elsewhere()
            if ready and number == _CLOSE:
                return
            if number in self._previous or (number and not ready):
                with self._noticing:
                    self._notice(number)

    def _notice(self, number: int) -> None:
        with self._mutex:
            again = self._signal is not None
            finish = self._finish
            if not again:
                self._signal = number
                self._leaving = finish is not None
        if again:
            if number == signal.SIGINT:
                self._exit(128 + number, alone=True)
            return
        self._writer.notice(number)
        if finish is None:
            said = f"{_NAMES[number]}: saving after this step; Ctrl-C again exits at once"
            print(said, flush=True)
        else:
            # A second Ctrl-C must find this thread listening.
            threading.Thread(target=self._leave, args=(finish,), daemon=True).start()

    def _say(self, message: str) -> None:
        # What is said when a signal is noticed comes first, unless nobody reads it.
        if self._noticing.acquire(timeout=1):
            self._noticing.release()
        assert self._signal is not None
        print(f"{_NAMES[self._signal]}: {message}", flush=True)

    def _leave(self, finish: Callable[[], str]) -> NoReturn:
        assert self._signal is not None
        code = 128 + self._signal
        try:
            self._say(finish())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            self._exit(code)

    def _exit(self, code: int, alone: bool = False) -> NoReturn:
        """Ends the process although its main thread, or a compiler's, does not listen.

        Unless `alone`, with the run's others, which hear of the signal within a second.
        """
        self._writer.release()
        if not alone:
            leave(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)

    def _wait_if_leaving(self) -> None:
        """Keeps the main thread from going on while another one ends the process."""
        if self._leaving:
            threading.Event().wait()
