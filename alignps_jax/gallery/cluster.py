"""Indexing on many machines: Ray's workers read and detect, this process alone writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray: nothing is reported anywhere

import ray
import ray.data

from alignps_jax.errors import UserError
from alignps_jax.gallery.index import Find, Results
from alignps_jax.inference.detector import Detector

_FILES = 64  # in one task; a kill costs a worker as much
_CPUS = 4  # of a worker without an accelerator


class Worker:
    """Finds people in files, with a detector of its own."""

    def __init__(self, load: Callable[[], Detector], find: Find):
        self._detector, self._find = load(), find

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = list(self._find(self._detector, batch["file"]))
        column = np.empty(len(found), object)
        column[:] = found
        return {"result": column}


def leave_accelerators() -> None:
    """Keeps this process, which only writes, from taking an accelerator that a worker needs."""
    jax.config.update("jax_platforms", "cpu")


def detect_on_cluster(
    address: str, load: Callable[[], Detector], find: Find, files: Sequence[str]
) -> Results:
    """What `find` gives, from all machines of a Ray cluster, in any order of the files.

    There is a worker (`load` makes its detector) for each accelerator, or for a few processors; for
    one that dies, another one reads its files again. The address is that of a cluster, "auto" (the
    one that this machine is in) or "local" (this machine alone); UserError if there is none.
    """
    dashboard = False if address == "local" else None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address, include_dashboard=dashboard, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--cluster={address}: found no Ray cluster ({reason})") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.verbose_stats_logs = False
    known = ray.cluster_resources()
    needs: dict[str, Any] = {"num_cpus": min(_CPUS, max(1, int(known.get("CPU", 2)) // 2))}
    if "GPU" in known:
        needs = {"num_gpus": 1}
    elif "TPU" in known:
        hosts = sum("TPU" in node["Resources"] for node in ray.nodes())
        needs = {"resources": {"TPU": known["TPU"] // hosts}}  # a process takes a whole host
    try:
        data = ray.data.from_items([{"file": file} for file in files])
        results = data.map_batches(
            Worker,
            fn_constructor_args=(load, find),
            batch_size=max(1, min(_FILES, len(files) // 8)),
            compute=ray.data.ActorPoolStrategy(min_size=1),
            **needs,
        )
        for row in results.iter_rows():
            yield row["result"]
    finally:
        ray.shutdown()
