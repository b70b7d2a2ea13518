"""Some seconds of fuzzing, and whether the fuzzer notices what it is there for."""

import os
import signal
import subprocess
import sys
import warnings

import pytest

from alignps_jax.types import UserError
from tests.fuzz import mutations
from tests.fuzz.runner import Reader, Run
from tests.places import ROOT

SECONDS = 10  # of reading; a dozen more go into building the sound files

# Some test of the same process may have started JAX's threads; nothing here uses them.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*os\.fork")


def test_no_reader_falls_for_damaged_files(tmp_path):
    command = ["-m", "tests.fuzz", f"--seconds={SECONDS}", "--seed=0", f"--keep={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(tmp_path, read, *, check=lambda _: None, **limits):
    """A reader of one file with the text `sound`."""

    def build(folder):
        (folder / "a.txt").write_text("sound")
        return [folder / "a.txt"]

    def read_damaged(_, path):
        content = path.read_bytes()
        return content if content == b"sound" else read(path, content)

    reader = Reader(build, read_damaged, check, mutations.damage, **limits)
    return Run("reader", reader, tmp_path / "reader", seed=1)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda *_: _raise(KeyError("a\nb")), r"KeyError: .*fuzz_test.py"),
        (lambda *_: _raise(UserError("two\nlines")), r"not one clear line: 'two\\nlines'"),
        # More than the allocator may have kept of what this process had before.
        (lambda *_: bytearray(3 << 30), "MemoryError"),
        (lambda *_: warnings.warn("NaN", RuntimeWarning, stacklevel=1), "RuntimeWarning: NaN"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "the process ended with -9"),
        (lambda *_: sys.exit(0), "the process ended with 1: .*SystemExit"),
        (lambda *_: signal.pause(), "took more than 1 s"),
    ],
)
def test_failures_are_found(tmp_path, read, what, capfd):
    fuzzed = run(tmp_path, read, seconds=1.0)
    fuzzed.batch(0.3)
    capfd.readouterr()
    assert fuzzed.tally.findings
    finding = fuzzed.tally.findings[0]
    assert finding.file == "a.txt"
    assert "\n" not in finding.what
    assert pytest.raises(AssertionError, match=what).matches(AssertionError(finding.what))


def test_garbage_that_was_accepted_is_found(tmp_path):
    def check(content):
        assert content == b"sound", "not sound"

    fuzzed = run(tmp_path, lambda _, content: content, check=check)
    fuzzed.batch(0.1)
    assert "AssertionError: not sound" in fuzzed.tally.findings[0].what


def test_inputs_are_counted_and_can_be_made_again(tmp_path):
    def read(path, content):
        if len(content) % 2:
            raise UserError(f"{path}: found an odd length, expected an even one")
        return content

    fuzzed = run(tmp_path, read)
    for _ in range(2):
        fuzzed.batch(0.1)
    tally = fuzzed.tally
    assert tally.inputs == tally.rejected + tally.accepted > 20
    assert min(tally.rejected, tally.accepted) > 5
    assert not tally.findings
    assert (tmp_path / "reader" / "a.txt").read_text() == "sound"
    inputs = [fuzzed.input(number) for number in range(200)]
    assert inputs == [fuzzed.input(number) for number in range(200)]
    assert len(set(inputs)) > 100


def test_reading_resumes_after_a_crash(tmp_path, capfd):
    def read(_, content):
        if len(content) % 7 == 0:
            os._exit(3)
        return content

    fuzzed = run(tmp_path, read)
    for _ in range(5):
        fuzzed.batch(0.2)
    numbers = [finding.number for finding in fuzzed.tally.findings]
    assert len(numbers) == 5
    assert numbers == sorted(set(numbers))
    assert fuzzed.tally.inputs == fuzzed.tally.accepted + 5
    for number in numbers:
        assert len(fuzzed.input(number)[1]) % 7 == 0
    capfd.readouterr()


def test_a_reader_that_refuses_sound_files_is_an_error(tmp_path):
    def build(folder):
        (folder / "a").write_text("sound")
        return [folder / "a"]

    reader = Reader(build, lambda *_: _raise(UserError("no")), print, mutations.damage)
    with pytest.raises(RuntimeError, match=r"sound files are not read: .*UserError: no"):
        Run("reader", reader, tmp_path / "reader", seed=1)


def test_an_unknown_reader_is_named():
    command = [sys.executable, "-m", "tests.fuzz", "--only=nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only=nothing: expected some of images, " in done.stderr
