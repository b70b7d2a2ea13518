"""Requests to stop: Ctrl-C, SIGTERM (preemption) and SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
from typing import Any, Self

import jax
from jax._src.distributed import global_state  # its preemption service has no public name
from jax.experimental import multihost_utils

from alignps_jax.distributed import gather, is_multiprocess


class Preemption:
    """Notes a request, so that training saves before it stops; a second Ctrl-C exits at once.

    JAX tells all processes of a SIGTERM to one of them, so other signals are passed on as SIGTERM.
    Signals that are ignored stay so. A context manager.
    """

    def __enter__(self) -> Self:
        self._signal, numbers = 0, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        if is_multiprocess():
            numbers.remove(signal.SIGTERM)
            jax.config.update("jax_enable_preemption_service", True)
            global_state.initialize_preemption_sync_manager()
        heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if is_multiprocess():
            manager: Any = global_state.preemption_sync_manager
            manager.shutdown()
            global_state.preemption_sync_manager = None
            self._previous[signal.SIGTERM] = signal.SIG_DFL
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._signal and kind is None:  # it came after the last step
            raise SystemExit(128 + self._signal)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal and number == signal.SIGINT:
            os._exit(128 + number)
        self._signal = self._signal or number
        if is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):  # nobody reads the standard error
            os.write(2, b"stopping after this step; Ctrl-C again exits at once\n")

    def exit_code(self, step: int) -> int | None:
        """The code to exit with after this step, None to go on; all processes ask at each step."""
        if is_multiprocess():
            if not multihost_utils.reached_preemption_sync_point(step):
                return None
            self._signal = max(gather(self._signal)) or signal.SIGTERM
        return 128 + self._signal if self._signal else None
