"""Damages files and hands them to readers, in processes that can die.

An input is a function of reader, seed and number, so whatever happens to the process, what it
read can be made again.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import random
import resource
import signal
import struct
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from alignps_jax.types import UserError
from tests.fuzz.mutations import Mutation

_STATE = struct.Struct("<QQQQ")
_MIXED = 0.1  # of the inputs, where the reader mixes files


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
      build: writes sound files to an empty folder; returns those that are to be damaged, in turn.
      read: reads what it is about; is handed the folder and the file that was damaged.
      check: raises AssertionError if what was read is not as the program may take it for granted.
      damage: how to damage a file.
      seconds: how long an input may take, on a machine that has nothing else to do.
      memory: how many bytes more than at the start an input may take.
      mixes: whether a file is now and then missing, or has the content of another one.
    """

    build: Callable[[Path], Sequence[Path]]
    read: Callable[[Path, Path], Any]
    check: Callable[[Any], None]
    damage: Mutation
    seconds: float = 10.0
    memory: int = 256 << 20
    mixes: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """An input that was not read as it should be: its number, the file, and what happened."""

    number: int
    file: str
    what: str


@dataclasses.dataclass
class Tally:
    """What became of the inputs of a reader."""

    inputs: int = 0
    rejected: int = 0
    accepted: int = 0
    findings: list[Finding] = dataclasses.field(default_factory=list)


class Run:
    """One reader under way: sound files in a folder, and the number of the next input."""

    def __init__(self, name: str, reader: Reader, folder: Path, seed: int):
        folder.mkdir(parents=True)
        self.tally = Tally()
        self._reader = reader
        self._folder = folder
        self._seed = f"{name}/{seed}"
        self._next = 0
        self._report = folder.parent / f"{name}.findings"
        self._stderr = folder.parent / f"{name}.stderr"
        # Shared with the process that reads: number of the input, when it began, counts.
        self._state = mmap.mmap(-1, _STATE.size)
        self._sound = self._build(folder.parent / f"{name}.files")

    def input(self, number: int) -> tuple[Path, bytes | None]:
        """The file that input `number` replaces, and its content; None: the file is missing."""
        rng = random.Random(f"{self._seed}/{number}")
        path = rng.choice(list(self._sound))
        if self._reader.mixes and rng.random() < _MIXED:
            return path, rng.choice((None, *self._sound.values()))
        return path, self._reader.damage(rng, self._sound[path])

    def batch(self, seconds: float) -> None:
        """Reads inputs in another process for about so long; adds what happened to the tally."""
        self._report.write_bytes(b"")
        self._state[:] = _STATE.pack(self._next, time.monotonic_ns(), 0, 0)
        child = self._start(lambda: self._work(time.monotonic() + seconds))
        try:
            death = self._watch(child)
        except KeyboardInterrupt:
            os.kill(child, signal.SIGKILL)
            raise
        for path, sound in self._sound.items():
            path.write_bytes(sound)
        number, _, rejected, accepted = _STATE.unpack(self._state[:])
        self.tally.rejected += rejected
        self.tally.accepted += accepted
        for line in self._report.read_text("utf-8", "replace").splitlines():
            failed, what = line.split("\t", 1)
            self._found(int(failed), what)
        if death:
            self._found(number, death)
            number += 1
        self.tally.inputs += number - self._next
        self._next = number

    def _found(self, number: int, what: str) -> None:
        self.tally.findings.append(Finding(number, self.input(number)[0].name, what))

    def _build(self, listed: Path) -> dict[Path, bytes]:
        """Writes the sound files and reads them, or nothing that follows would mean much.

        In another process: libraries start threads, and a process that this one starts later
        would be without them.
        """

        def work() -> None:
            files = self._reader.build(self._folder)
            for path in files:
                self._reader.check(self._reader.read(self._folder, path))
            listed.write_text("\n".join(map(str, files)))

        if os.waitpid(self._start(work), 0)[1]:
            raise RuntimeError(f"sound files are not read: {self._last_words()}")
        paths = map(Path, listed.read_text().split("\n"))
        return {path: path.read_bytes() for path in paths}

    def _start(self, work: Callable[[], None]) -> int:
        """Starts a process that does `work` and ends with 0, or with 1 if it raises anything."""
        child = os.fork()
        if child:
            return child
        try:
            # Where decoders complain, and where Python says in what it crashed.
            printed = os.open(self._stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            work()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)

    def _watch(self, child: int) -> str:
        """Waits for the process; says what it died of, "" if it did not."""
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            began = _STATE.unpack(self._state[:])[1]
            crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
            if time.monotonic_ns() - began > crowd * self._reader.seconds * 1e9:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"took more than {self._reader.seconds:g} s"
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(status)
        return f"the process ended with {code}: {self._last_words()}" if code else ""

    def _last_words(self) -> str:
        """What the process said when it crashed."""
        words = self._stderr.read_text("utf-8", "replace")
        crash = words.rfind("Fatal Python error")
        return ascii(words[crash:][:600] if crash >= 0 else words[-600:])

    def _work(self, until: float) -> None:
        # What numpy only warns of, such as a NaN that becomes an integer, is garbage here.
        warnings.simplefilter("error", RuntimeWarning)
        logging.set_verbosity(logging.FATAL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self._reader.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number, rejected, accepted = self._next, 0, 0
        last = None
        with self._report.open("w") as report:
            while time.monotonic() < until:
                self._state[:] = _STATE.pack(number, time.monotonic_ns(), rejected, accepted)
                path, content = self.input(number)
                if last not in (None, path):
                    last.write_bytes(self._sound[last])
                _put(path, content)
                last = path
                what = self._outcome(path)
                rejected += what == ""
                accepted += what is None
                if what:
                    report.write(f"{number}\t{what}\n")
                    report.flush()
                number += 1
            self._state[:] = _STATE.pack(number, time.monotonic_ns(), rejected, accepted)

    def _outcome(self, path: Path) -> str | None:
        """None: read and sound; "": refused in one clear line; else what went wrong."""
        try:
            self._reader.check(self._reader.read(self._folder, path))
        except UserError as error:
            return _unclear(str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            return ascii(what)[:500]
        return None


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def _unclear(message: str) -> str:
    """What is wrong with a message, "" if nothing is."""
    controls = [letter for letter in message if unicodedata.category(letter) in ("Cc", "Cs")]
    if controls:
        return f"not one clear line: {ascii(message)[:400]}"
    return ""
