"""The processes of one run: how they find one another, agree, wait, and end together.

They talk through JAX's coordination service, which process 0 keeps, and not through the file
system (which may show a file to one machine later than to another) nor through the devices (where a
process that waits for an hour is an error). In a run of one process nothing here waits or talks.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the client has no public name; Orbax takes it from here, too

from alignps_jax.types import UserError

# Exit code of a process whose peer ended without a word.
LOST_PEER = 4
# After so many seconds without a sign of life a process counts as dead.
HEARTBEAT = 40
# So long do processes look for one another at the start, in seconds.
START = 300
# So long does a process that failed wait for those that failed alike, and one that was told to stop
# for those that save, in seconds.
_FAILED, _STOPPED = 10, 120
_POLL = 0.2
# So long does process 0 stay for the others to see that all are through, in seconds.
_GOODBYE = 2.0
_WAIT_MS = 10_000

_FATAL = b"JAX distributed service detected fatal errors"
_OF_SERVICE = re.compile(rb"coordination_service|preemption_sync_manager")
_DEAD = re.compile(rb"unhealthy \(stopped sending heartbeats\):\s*((?:\d[\d, ]*\n)+)")
_NO_SERVICE = re.compile(rb"Socket closed|Connection reset|Connection refused|failed to connect")
# What collectives say when a process at the other end is gone.
_BLAMES_A_PEER = re.compile(r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|peer|collective", re.I)
_counter = itertools.count()

T = TypeVar("T")


def several() -> bool:
    """Whether the run has several processes."""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def leads() -> bool:
    """Whether this is process 0 of the run."""
    return distributed.global_state.process_id == 0


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
    start: int = START,
) -> None:
    """Joins the other processes of the run; without arguments, as the cluster's manager says.

    JAX knows SLURM, Open MPI, Kubernetes and Cloud TPUs. From now on, the end of one process ends
    the others within `heartbeat` seconds, with one line and the exit code `LOST_PEER`; so does one
    that does not come.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: which one this is.
      heartbeat: seconds without a sign of life after which a process counts as dead.
      start: seconds in which all have to come.

    Raises:
      UserError: there is no cluster, or process 0 cannot listen where it should.
    """
    joined = threading.Event()
    _listen_to_the_service(joined, start)
    how = "deactivate" if coordinator else None  # flags mean what they say, also below SLURM
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=how,
                heartbeat_timeout_seconds=heartbeat,
                initialization_timeout=start,
            )
        joined.set()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        if coordinator:
            raise UserError(
                f"--coordinator: found {coordinator}, where the run cannot begin "
                f"({_first_line(error)})"
            ) from error
        hints = "".join(f"; {' '.join(str(one.message).split())}" for one in warned)
        raise UserError(
            f"--distributed: found no cluster that can be used ({_first_line(error)}{hints}), "
            "expected the environment of SLURM (srun), Open MPI (mpirun), Kubernetes or a Cloud "
            "TPU; elsewhere give --coordinator, --processes and --process"
        ) from error


class Expendable(threading.Thread):
    """A thread whose work nobody needs any more once the process is through."""


def end(code: int) -> NoReturn:
    """Ends a process that is through, even if an `Expendable` thread of it is still at work.

    Python would wait for it, and a compiler takes minutes; it crashes where the thread is a daemon.
    """
    if not any(isinstance(thread, Expendable) for thread in threading.enumerate()):
        sys.exit(code)
    if several():
        jax.distributed.shutdown()  # waits for the others, as Python's own end does
    _exit(code)


def agree(find: Callable[[], T]) -> T:
    """What process 0 finds, in every process; all call it, in the same order.

    It is for what lies in a shared folder, which the file system may show to them at different
    times. The value travels as JSON. Where process 0 raises, all do.
    """
    if not several():
        return find()
    key = f"agreed/{next(_counter)}"
    if leads():
        with _published_failure(key):
            value = find()
            _client().key_value_set(key, json.dumps({"value": value}))
        return value
    return _wait_for(key)


def gather(value: T) -> list[T]:
    """What each process gives, in all of them; all call it, in the same order.

    It is for a few words and numbers, which travel as JSON.
    """
    if not several():
        return [value]
    state, key = distributed.global_state, f"gathered/{next(_counter)}"
    _client().key_value_set(f"{key}/{state.process_id}", json.dumps({"value": value}))
    return [_wait_for(f"{key}/{process}") for process in range(state.num_processes)]


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 goes through the body alone, the others after it.

    Raises:
      UserError: in the others, when process 0 did not come through.
    """
    if not several():
        yield
        return
    key = f"agreed/{next(_counter)}"
    if leads():
        with _published_failure(key):
            yield
            _client().key_value_set(key, json.dumps({"value": None}))
        return
    _wait_for(key)
    yield


def end_together(run: Callable[[], int]) -> int:
    """Calls `run`, which gives an exit code, and waits for the other processes with theirs.

    A process that fails alone ends at once, which ends the others. Nothing is raised in a run of
    several processes: an exit code comes back, or the process ends.
    """
    try:
        code = run()
    except SystemExit as leaving:
        if not several():
            raise
        code = leaving.code if isinstance(leaving.code, int) else 1
    except Exception as error:
        if not several():
            raise
        if _BLAMES_A_PEER.search(str(error)):
            time.sleep(1.5 * HEARTBEAT)  # once it counts as dead, this process ends
        traceback.print_exc()
        code = 1
    leave(code)
    return code


def leave(code: int) -> None:
    """Says that this process is through; waits for the others, or ends it where they stay away.

    With exit code 0 it waits as long as it takes. (Process 0 writes the results of all.) A run of
    one process waits for nobody.
    """
    if not several():
        return
    client, state = _client(), distributed.global_state
    patience = _STOPPED if code >= 128 else _FAILED if code else float("inf")
    end = time.monotonic() + patience
    try:
        client.key_value_set(f"ended/{state.process_id}", str(code), allow_overwrite=True)
        while len(client.key_value_dir_get("ended/")) < state.num_processes:
            if time.monotonic() > end:
                _exit(code)
            time.sleep(_POLL)
    except jax.errors.JaxRuntimeError:  # process 0 is gone, and its service with it
        _exit(code if code else LOST_PEER)
    if 0 < code < 128:
        # Python would wait for threads, which may wait for others. Process 0 keeps the service.
        time.sleep(_GOODBYE if leads() else 0)
        _exit(code)


@contextlib.contextmanager
def _published_failure(key: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _client().key_value_set(key, json.dumps({"failed": True}))
        raise


def _wait_for(key: str) -> Any:
    while True:
        try:
            found = json.loads(_client().blocking_key_value_get(key, _WAIT_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            continue
        if "failed" in found:
            raise UserError("process 0 of the run failed, for the reason that it gives")
        return found["value"]


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None
    return client


def _listen_to_the_service(joined: threading.Event, start: int) -> None:
    """Puts one line and an exit code in the place of what JAX does when a process is gone.

    Its C++ prints a page and aborts. So what C++ writes to the standard error goes through a
    thread of ours, which ends the process before it aborts: `abort` calls the handler of its
    signal first, and ours sleeps for some seconds. Python's own stream goes where it went before.
    """
    sys.stderr.flush()
    real = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = open(real, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))  # sleep(SIGABRT)
    late = f"the processes of the run did not all come within {start} s, so this one ends"

    def describe(said: bytes) -> str:
        return _lost(said) if joined.is_set() else late

    threading.Thread(target=_pass_on, args=(reading, real, describe), daemon=True).start()


def _pass_on(reading: int, real: int, describe: Callable[[bytes], str]) -> None:
    """Copies from one file to another, until JAX says that a process is gone."""
    held = b""
    while True:
        # What the service says before it gives up is held back, as long as it may yet do so.
        if not select.select([reading], [], [], 2.0 if held else None)[0]:
            os.write(real, held)
            held = b""
            continue
        held += os.read(reading, 1 << 16)
        if _FATAL in held:
            while select.select([reading], [], [], 0.5)[0]:
                held += os.read(reading, 1 << 16)
            os.write(real, f"error: {describe(held)}\n".encode())
            _exit(LOST_PEER)
        if not _OF_SERVICE.search(held):
            os.write(real, held)
            held = b""


def _lost(said: bytes) -> str:
    """What happened, given what the service said."""
    found = _DEAD.search(said)
    who = f"process {' '.join(found[1].decode().split())}" if found else "another process"
    if not found and _NO_SERVICE.search(said):
        who = "process 0"
    return (
        f"{who} of the run ended or does not answer, so this one ends, too; the same commands "
        "resume from the last checkpoint"
    )


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
