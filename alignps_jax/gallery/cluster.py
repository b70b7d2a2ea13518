"""Indexing on many machines: Ray's workers read and detect, this process alone writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray: nothing is reported anywhere

import ray
import ray.data

from alignps_jax.errors import UserError
from alignps_jax.gallery.index import Find, Results, find_people
from alignps_jax.inference.detector import Detector

_FILES = 64  # in one task; a kill costs a worker as much
_CPUS = 4  # of a worker without an accelerator


class Worker:
    """Finds people in files, with a detector of its own."""

    def __init__(self, load: Callable[[], Detector], *how: Any):
        self._detector, self._how = load(), how

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": list(find_people(self._detector, batch["file"], *self._how))}


def on_cluster(address: str, load: Callable[[], Detector]) -> Find:
    """`find_people` by all machines of a Ray cluster, in any order of the files.

    There is a worker (`load` makes its detector) for each accelerator, or for a few processors; for
    one that dies, another one reads its files again. The address is that of a cluster, "auto" (the
    one that this machine is in) or "local" (this machine alone); UserError if there is none.
    """
    jax.config.update("jax_platforms", "cpu")  # this process leaves accelerators to the workers
    return partial(_find, address, load)


def _find(
    address: str, load: Callable[[], Detector], _: Detector, files: Sequence[str], *how: Any
) -> Results:
    page: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        cluster = ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **page)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--cluster={address}: found no Ray cluster ({reason})") from error
    with cluster:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        known = ray.cluster_resources()
        needs: dict[str, Any] = {"num_cpus": max(1, min(_CPUS, int(known.get("CPU", 0)) // 2))}
        if "GPU" in known:
            needs = {"num_gpus": 1}
        elif "TPU" in known:
            hosts = sum("TPU" in node["Resources"] for node in ray.nodes())
            needs = {"resources": {"TPU": known["TPU"] // hosts}}  # a process takes a whole host
        results = ray.data.from_items([{"file": file} for file in files]).map_batches(
            Worker,
            fn_constructor_args=(load, *how),
            batch_size=max(1, min(_FILES, len(files) // 8)),
            compute=ray.data.ActorPoolStrategy(min_size=1),
            **needs,
        )
        yield from (row["result"] for row in results.iter_rows())
