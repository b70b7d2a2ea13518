"""Interrupts training at random moments, and compares what resumes with a run left alone.

    python -m tests.soak --kills=50 [--processes=2] [--seed=1]

A start on a few tiny scenes gets kill -9 while it prepares data, compiles, trains, saves, evaluates
or writes its results; now and then SIGTERM, Ctrl-C, or a limit on the size of files, which is what
a full disk looks like. Of several processes one gets the signal. The same command goes on from
there; a run that comes to its end must have the log, the results and the checkpoints of one that
nothing interrupted. Prints a line per start; exit code 1 and the folder if anything is otherwise.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tests.conftest  # noqa: F401 (the settings of all tests, which processes inherit)
from alignps_jax.checkpoint.store import load_arrays
from tests.runs import link_cache, start

FLAGS = (
    "--config.train.duration=9 steps",
    "--config.train.eval_every=3 steps",
    "--config.train.checkpoint_every=2 steps",
    "--config.train.keep_checkpoints=2",
    # A network of few parts: most of a start is their tracing.
    *("--noconfig.model.lateral_deform", "--noconfig.model.output_deform"),
    *("--config.model.head_convs=0", "--noconfig.model.concatenate", "--config.loss.triplet=none"),
)
FULL = "a full disk"
# The exit codes of the process that something happens to, and how often it does.
CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143), signal.SIGINT: (-2, 130), FULL: (2,)}
EVENTS = [*[signal.SIGKILL] * 7, signal.SIGTERM, signal.SIGINT, FULL]
ABORTED = -signal.SIGABRT  # so JAX ends a process whose peer is gone
PATIENCE = 900  # seconds
CLOCK = ("images_per_second", "data_wait")
FINDING = Path("runs/soak")


class Run:
    """A run in a folder of its own, with the compiled programs of all."""

    def __init__(self, folder: Path, name: str, processes: int):
        self.data, self.workdir, self._count = folder / name, folder / name / "run", processes
        link_cache(folder, self.workdir)

    def start(self) -> list[subprocess.Popen[str]]:
        return start(self.data, self.workdir, *FLAGS, count=self._count, devices=1)

    def results(self) -> dict[str, object]:
        """By name, all that must not depend on how often a run was interrupted."""
        lines = [json.loads(x) for x in (self.workdir / "log.jsonl").read_text().splitlines()]
        found: dict[str, object] = {
            "log": [{name: x for name, x in line.items() if name not in CLOCK} for line in lines],
            "left over": [*map(str, self.workdir.rglob("*.tmp"))],
        }
        for name in ("metrics.json", "queries.csv"):
            found[name] = (self.workdir / name).read_text()
        with np.load(self.workdir / "detections.npz") as saved:
            found["detections"] = {name: saved[name].tobytes() for name in saved.files}
        for folder in (self.workdir / "checkpoints").iterdir():
            arrays = load_arrays(folder, lambda name: True)
            found[f"step {folder.name}"] = {name: x.tobytes() for name, x in arrays.items()}
            score = folder / "metrics" / "metrics"
            found[f"score of {folder.name}"] = score.exists() and score.read_text()
        return found


def interrupted(run: Run, event: signal.Signals | str, seconds: float) -> tuple[bool, list[str]]:
    """A start that something happens to: whether it came to its end, and what is wrong with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if event == FULL:  # the processes inherit it
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** random.uniform(2, 6)), limits[1]))
    processes = run.start()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if event != FULL:
        victim = random.choice(processes)
        end = time.monotonic() + random.uniform(0, seconds)
        tmp = "checkpoints/*.orbax-checkpoint-tmp*" if random.random() < 0.3 else "never"
        while victim.poll() is None and time.monotonic() < end and not any(run.workdir.glob(tmp)):
            time.sleep(0.005)
        victim.send_signal(event)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    codes = [process.returncode for process in processes]
    # A Ctrl-C that falls into the start of Python, or into a callback, which swallows it.
    if any("init_import_site" in x or "Exception ignored in" in x for x in outputs):
        return not any(codes), []
    expected = {0, *CODES[event], *[ABORTED] * (len(processes) > 1)}
    problems = [] if expected.issuperset(codes) else [f"it ended with {codes}"]
    problems += ["a traceback"] * any("Traceback" in output for output in outputs)
    errors = [x for output in outputs for x in output.splitlines() if x.startswith("error: ")]
    if errors if event != FULL else 2 in codes and not all("File too large" in x for x in errors):
        problems.append(f"it said {errors}")
    if problems:
        (run.workdir / "output.txt").write_text("\n\n".join(outputs))
    return not any(codes), problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--kills", type=int, default=50, help="starts to interrupt")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    logging.getLogger("absl").setLevel("ERROR")
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, count = Path(temporary), arguments.processes
        for attempt in ("first", "alone"):  # the first one also compiles
            run, begun = Run(folder, attempt, count), time.monotonic()
            for process in run.start():
                output = process.communicate(timeout=PATIENCE)[0]
                assert process.returncode == 0, output
        seconds, expected = time.monotonic() - begun, run.results()
        print(f"a run that is left alone takes {seconds:.0f} s")
        run, events, finished = Run(folder, "0", count), collections.Counter(), 0
        while events.total() < arguments.kills or not finished:
            event = random.choice(EVENTS)
            name = getattr(event, "name", event)
            events[name] += 1
            ended, problems = interrupted(run, event, seconds)
            if ended:
                found = run.results()
                other = [x for x in found | expected if found.get(x) != expected.get(x)]
                problems += [f"not as in a run left alone: {', '.join(other)}"] * bool(other)
            print(f"{events.total()}: {name}, {'ended' if ended else 'stopped'} {problems}")
            if problems:
                shutil.copytree(run.workdir, FINDING, symlinks=True, dirs_exist_ok=True)
                print(f"FINDING, kept in {FINDING}")
                return 1
            if ended:
                run, finished = Run(folder, str(events.total()), count), finished + 1
    print(f"{dict(events)}; {finished} runs came to their end, each as one left alone")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
