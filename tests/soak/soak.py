"""Interrupts training again and again, and holds what comes out against an uninterrupted run."""

from __future__ import annotations

import collections
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak.results import differences, results
from tests.soak.starts import Start

STEPS, EVAL_EVERY, SAVE_EVERY = 9, 3, 2
FLAGS = (
    "--config=configs/tiny.py",
    f"--config.train.duration={STEPS} steps",
    f"--config.train.eval_every={EVAL_EVERY} steps",
    f"--config.train.checkpoint_every={SAVE_EVERY} steps",
    "--config.train.keep_checkpoints=2",
    # A network of few parts: most of a start is their tracing.
    *("--noconfig.model.lateral_deform", "--noconfig.model.output_deform"),
    *("--config.model.head_convs=0", "--noconfig.model.concatenate", "--config.loss.triplet=none"),
)
# A finished or ended start takes no longer, on the slowest machine.
PATIENCE = 900.0
# Seconds within which a signal must end a start.
SOON = 20.0
SIGNALS = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("Ctrl-C", 130)}
AIMS = ("anywhere", "anywhere", "preparing", "saving", "evaluating")
MOMENTS = ("preparing", "starting", "training", "saving", "evaluating", "finishing")


class Soak:
    """Runs of training in folders below `folder`, and what became of them.

    Attributes:
      kills: how many starts were killed, by the moment at which it came.
      stops: by signal, the seconds until the end of each start that got it.
      second: how many second runs on one workdir were refused.
      full: how many starts ended for want of room, in one line.
      finished: how many interrupted runs were brought to their end and equal the uninterrupted one.
      findings: what went wrong.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None] = print):
        self._folder, self._say = folder, say
        self._chance = random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        self.stops: dict[str, list[float]] = {name: [] for name, _ in SIGNALS.values()}
        self.second = self.full = self.finished = 0
        self.findings: list[str] = []
        self._number = 0
        self._whole_run()
        self._next_run()

    def _whole_run(self) -> None:
        """The uninterrupted run: twice, because the first one also compiles."""
        for name in ("first", "uninterrupted"):
            self._enter(name)
            start, began = self._start(), time.monotonic()
            start.wait(PATIENCE)
            if start.exit_code != 0:
                raise RuntimeError(f"the uninterrupted run ended with {start.output}")
            self._seconds = time.monotonic() - began
        self._expected = results(self._workdir)
        self._say(f"an uninterrupted run takes {self._seconds:.1f} s")

    def _enter(self, name: str) -> None:
        """Makes a run's folder, with data of its own and the compiled programs of all."""
        self._workdir, self._data = self._folder / name, self._folder / f"{name}-data" / "tiny"
        programs = self._folder / "programs"
        programs.mkdir(exist_ok=True)
        self._workdir.mkdir()
        (self._workdir / "xla_cache").symlink_to(programs)

    def _next_run(self) -> None:
        if self._number:
            shutil.rmtree(self._workdir)
            shutil.rmtree(self._data.parent)
        self._number += 1
        self._enter(f"run-{self._number}")

    def _start(self, file_bytes: int | None = None) -> Start:
        where = (f"--workdir={self._workdir}", f"--config.data.root={self._data}")
        return Start([*FLAGS, *where], file_bytes)

    def kill(self) -> None:
        """One start that gets kill -9."""
        start = self._start()
        self._wait_for(start, self._chance.choice(AIMS))
        if self._ended_by_itself(start):
            return
        start.send(signal.SIGKILL)
        self._check_output(start)
        self.kills[self._moment(start)] += 1

    def stop(self) -> None:
        """One start that gets SIGTERM or Ctrl-C."""
        start = self._start()
        number = self._chance.choice(list(SIGNALS))
        start.wait(PATIENCE, lambda: "training on" in start.output)
        start.wait(0.2 + self._chance.uniform(0, self._seconds))
        if self._ended_by_itself(start):
            return
        seconds = start.send(number)
        name, code = SIGNALS[number]
        if start.exit_code == 0:  # it was about to end
            self._ended_by_itself(start)
            return
        # While it does not train, it ends as any program.
        if start.exit_code not in (code, -number) or seconds > SOON:
            self._find(f"{name}: exit code {start.exit_code} after {seconds:.1f} s", start)
        self._check_output(start)
        self.stops[name].append(seconds)

    def fill(self) -> None:
        """One start that finds no room for files of some size."""
        start = self._start(int(10 ** self._chance.uniform(2, 6)))
        start.wait(PATIENCE)
        if start.exit_code == 2:
            errors = [line for line in start.output.splitlines() if "error" in line.lower()]
            if len(errors) != 1 or not errors[0].startswith("error: "):
                self._find("a full disk is not one line", start)
            elif "cannot be written (File too large)" not in errors[0]:
                self._find(f"a full disk is {errors[0]}", start)
            if "Traceback" in start.output:
                self._find("a full disk ends in a traceback", start)
            self.full += 1
        else:
            self._ended_by_itself(start)

    def finish(self) -> None:
        """Brings the present run to its end."""
        start = self._start()
        start.wait(PATIENCE)
        self._ended_by_itself(start)

    def crowd(self) -> None:
        """One start that reaches its end although a second one tries the same workdir."""
        start = self._start()
        start.wait(PATIENCE, lambda: "training on" in start.output)
        start.wait(self._chance.uniform(0, 0.5 * self._seconds))
        if not start.is_over():
            second = self._start()
            second.wait(PATIENCE)
            lines, first = second.output.splitlines(), f"(process {start.pid} on "
            if second.exit_code != 2 or len(lines) != 1 or first not in lines[0]:
                self._find("a second run was not refused in one line", second)
            self.second += 1
        start.wait(PATIENCE)
        self._ended_by_itself(start)

    def _wait_for(self, start: Start, aim: str) -> None:
        """Waits for the moment that is aimed at, if it comes, and a little more."""
        seen = {
            "preparing": lambda: any(self._data.parent.rglob("*incomplete*")),
            "saving": self._is_saving,
            "evaluating": self._is_evaluating,
        }
        if aim == "anywhere":
            start.wait(self._chance.uniform(0, self._seconds))
        else:
            start.wait(1.5 * self._seconds, seen[aim])
            start.wait(self._chance.uniform(0, 0.02 if aim == "saving" else 0.5))

    def _is_saving(self) -> bool:
        return any((self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def _steps(self) -> list[int]:
        entries = (self._workdir / "checkpoints").glob("*")
        return sorted(int(entry.name) for entry in entries if entry.name.isdigit())

    def _is_evaluating(self) -> bool:
        steps = self._steps()
        due = bool(steps) and (steps[-1] % EVAL_EVERY == 0 or steps[-1] == STEPS)
        return due and not (self._workdir / "checkpoints" / str(steps[-1]) / "metrics").exists()

    def _moment(self, start: Start) -> str:
        """What a start that was killed had been doing, by what it left and said."""
        steps = self._steps()
        if self._is_saving():
            return "saving"
        if not any(self._data.parent.glob("tiny/prepared/*/*/[0-9]*")):
            return "preparing"
        if steps and steps[-1] == STEPS and not self._is_evaluating():
            return "finishing"
        if "compiling the training step" not in start.output and not (
            self._is_evaluating() and "resuming" in start.output
        ):
            return "starting"
        return "evaluating" if self._is_evaluating() else "training"

    def _ended_by_itself(self, start: Start) -> bool:
        """Judges a start that nothing interrupted, and begins the next run."""
        if not start.is_over():
            return False
        if start.exit_code != 0:
            self._find(f"a start ended with exit code {start.exit_code}", start)
        else:
            self._check_output(start)
            different = differences(results(self._workdir), self._expected)
            if different:
                self._find(f"not as the uninterrupted run: {', '.join(different)}", start)
            else:
                self.finished += 1
        self._next_run()
        return True

    def _check_output(self, start: Start) -> None:
        if "Traceback" in start.output or "error: " in start.output:
            self._find("a start that resumes complains", start)

    def _find(self, what: str, start: Start) -> None:
        kept = self._folder / f"finding-{len(self.findings) + 1}"
        shutil.copytree(self._workdir, kept, symlinks=True, ignore_dangling_symlinks=True)
        (kept / "output.txt").write_text(start.output)
        self.findings.append(f"{kept}: {what}")
        self._say(f"finding: {self.findings[-1]}")


def run_soak(soak: Soak, kills: int, stops: int, full: int, second: int) -> None:
    """Kills starts until there were so many, with the other mishaps spread between them."""
    plan = {
        soak.kill: (kills, lambda: sum(soak.kills.values())),
        soak.stop: (stops, lambda: sum(map(len, soak.stops.values()))),
        soak.fill: (full, lambda: soak.full),
        soak.crowd: (second, lambda: soak.second),
    }
    while any(count() < wanted for wanted, count in plan.values()):
        # Next is what is furthest behind its share.
        next_one = min(plan, key=lambda turn: (plan[turn][1]() + 1) / max(plan[turn][0], 1e-9))
        next_one()
    soak.finish()


def print_table(soak: Soak, say: Callable[[str], None] = print) -> None:
    """What was done, and what came out."""
    row = "{:44}{:>8}".format
    say(row("kill -9 while", "times"))
    for moment in MOMENTS:
        say(row(f"  {moment}", soak.kills[moment]))
    say(row("  in all", sum(soak.kills.values())))
    for name, seconds in soak.stops.items():
        slowest = f", the slowest in {max(seconds):.1f} s" if seconds else ""
        say(row(f"ended by {name}{slowest}", len(seconds)))
    say(row("second runs on one workdir, refused", soak.second))
    say(row("no room for a file, one line", soak.full))
    say(row("runs brought to an end, as if uninterrupted", soak.finished))
    say(row("findings", len(soak.findings)))
