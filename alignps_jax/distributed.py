"""The processes of one run: they join, wait for one another, and agree on values.

They talk through JAX's coordination service: collectives of the devices cannot wait for hours. JAX
ends a process whose peer died. A run of one process waits nowhere.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed as _distributed

from alignps_jax.types import UserError

REMINDER = 15  # seconds between two lines about processes that have not come yet
_GOODBYE = 60  # seconds that a process which failed waits for those that fail alike
_DAY_MS = 24 * 60 * 60 * 1000
global_state: Any = _distributed.global_state  # the client has no public name
_calls = itertools.count()


def is_multiprocess() -> bool:
    """Whether the run has several processes."""
    return global_state.client is not None and global_state.num_processes > 1


def is_main_process() -> bool:
    """Whether this is process 0, which alone logs and writes results."""
    return global_state.process_id == 0


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the run's other processes, at host:port of process 0 or as the cluster's manager says.

    Raises UserError if there is no cluster, or process 0 cannot listen where it should.
    """
    joined = threading.Event()
    peers = f"{processes} processes at {coordinator}" if coordinator else "processes of the run"

    def remind() -> None:  # JAX gives up after 300 s
        for number in itertools.count(1):
            if joined.wait(REMINDER):
                return
            print(f"waited {number * REMINDER} s for all {peers}", file=sys.stderr, flush=True)

    threading.Thread(target=remind, daemon=True).start()
    # JAX's preemption service swallows SIGTERM, so only training starts it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(coordinator, processes, process),
            cluster_detection_method="deactivate" if coordinator else None,
            shutdown_timeout_seconds=_GOODBYE,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise UserError(
            f"the processes of the run cannot join ({str(error).splitlines()[0]}), expected SLURM, "
            "Open MPI, Kubernetes or Cloud TPUs, or --coordinator, --processes and --process"
        ) from error
    finally:
        joined.set()


def leave(code: int) -> NoReturn:
    """Ends the process; after a failure without its threads, and soon all others of the run."""
    if code and is_multiprocess():
        sys.stdout.flush()
        sys.stderr.flush()
        jax.distributed.shutdown()  # waits for `_GOODBYE`; then JAX aborts all
        os._exit(code)
    sys.exit(code)


def barrier(name: str) -> None:
    """Waits until all processes have come here."""
    if is_multiprocess():
        global_state.client.wait_at_barrier(f"{name}/{next(_calls)}", _DAY_MS)


def gather(value: Any) -> list[Any]:
    """What each process passes (JSON), in all of them."""
    if not is_multiprocess():
        return [value]
    client, call = global_state.client, next(_calls)
    client.key_value_set(f"{call}/{global_state.process_id}", json.dumps(value))
    keys = [f"{call}/{process}" for process in range(global_state.num_processes)]
    return [json.loads(client.blocking_key_value_get(key, _DAY_MS)) for key in keys]


def broadcast_from_main(value: Any) -> Any:
    """What process 0 passes (JSON), in all processes."""
    return gather(value)[0]


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Process 0 goes through the body alone, the others after it."""
    if not is_main_process():
        barrier("main process first")
    yield
    if is_main_process():
        barrier("main process first")
