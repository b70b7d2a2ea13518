"""A cluster's life on this machine: `make cluster`, some ten minutes on two idle cores.

First two processes reproduce a table of the paper, with a few steps for each row, twice: the second
time nothing is left to do.

Four processes, started as SLURM would, train from nothing: without data set, without workdir. One
is killed; JAX has to end the others. Two, of two devices each, resume, with a file
system that answers late. The losses have to be those of one process that nobody disturbed, and
everything written once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs.variants import rows_of
from tests.cluster import finish, slurm, start
from tests.places import ROOT
from tests.soak.settings import compile_quickly
from tests.training.train_test import command, environment, losses

EVERY_STEP = "--config.train.checkpoint_every=1 steps"
ENDLESS = ("--config.train.duration=4000 steps", EVERY_STEP)
# Both arms of a comparison sum up in other orders, which grows from step to step.
TOLERANCE = 1e-3

# Python runs this before all else: what asks the file system waits up to 50 ms, in each process
# at other times.
LATE = """
import os, random, time

waits = random.Random(os.getpid())

def late(call):
    def wrapped(*args, **kwargs):
        time.sleep(waits.uniform(0, 0.05))
        return call(*args, **kwargs)
    return wrapped

for name in ("rename", "replace", "listdir", "scandir", "mkdir", "unlink"):
    setattr(os, name, late(getattr(os, name)))
"""


def killed_run(shared: Path, workdir: Path) -> float:
    """Four from nothing, of which one is killed; the seconds until the last one ended."""
    processes = start(shared, workdir, *ENDLESS, count=4, devices=1, joining=slurm)
    while not (workdir / "checkpoints" / "2").exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    processes[2].kill()
    killed = time.monotonic()
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    seconds = time.monotonic() - killed
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        if index != 2:
            assert process.returncode != 0, output
    return seconds


def check_written_once(workdir: Path, outputs: list[str]) -> None:
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), steps
    for word in ("metrics ", "rankings ", "curves ", "resuming "):
        said = [output.count(f"\n{word}") for output in outputs]
        assert said[0] >= 1, (word, said)
        assert not any(said[1:]), (word, said)
    assert not list(workdir.rglob("*.tmp")) + list(workdir.rglob("*orbax-checkpoint-tmp*"))


def reproduce(shared: Path) -> None:
    workdir, few = shared / "table", "3 steps"
    flags = ["--mode=reproduce", "--table=5", "--seeds=1", f"--config.train.duration={few}"]
    flags += [f"--config.train.{name}_every={few}" for name in ("checkpoint", "eval")]
    rows = [name or "alignps" for name, _ in rows_of("5", "synthetic")]
    for _ in range(2):
        outputs = finish(start(shared, workdir, *flags, devices=1))
        written = (workdir / "table5.md").read_text()
        assert written in outputs[0]
        assert not any(line.startswith(("table", "metrics")) for line in outputs[1].splitlines())
        for row in rows:
            assert sorted(losses(workdir / row / "seed0")) == [1, 2, 3], row
    assert "training" not in "".join(outputs), "a finished row was trained again"
    print(f"two processes reproduced the {len(rows)} rows of a table, each once", flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        reproduce(Path(folder))
        shared, late = Path(folder), Path(folder) / "late"
        late.mkdir()
        (late / "sitecustomize.py").write_text(LATE)
        workdir, alone = shared / "together", shared / "alone"
        seconds = killed_run(shared, workdir)
        print(f"one of four was killed; the others ended within {seconds:.0f} s", flush=True)
        assert seconds < 180
        before = max(losses(workdir))
        steps = (f"--config.train.duration={before + 2} steps", EVERY_STEP)
        variables = {"PYTHONPATH": str(late)}
        outputs = finish(start(shared, workdir, *steps, joining=slurm, variables=variables))
        check_written_once(workdir, outputs)
        print(f"two resumed after step {before} at the latest, with late files", flush=True)
        words = command(shared, alone, *steps)
        subprocess.run(words, cwd=ROOT, env=environment(1), check=True, capture_output=True)
        found, expected = losses(workdir), losses(alone)
        assert sorted(found) == sorted(expected)
        worst = max(
            abs(found[step][name] - value) / max(abs(value), 1e-9)
            for step, line in expected.items()
            for name, value in line.items()
        )
        print(f"losses of {len(expected)} steps differ from one process's by {worst:.1e} at most")
        return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    compile_quickly()
    sys.exit(main())
