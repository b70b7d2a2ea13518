"""The command line: help, mistakes in one line, exit codes, and output that nobody reads."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from alignps_jax import __version__
from alignps_jax.cli import main, parse
from alignps_jax.flags import FLAGS, MODES, Mode
from alignps_jax.types import IncompleteError, UserError
from tests.places import ROOT

EXAMPLES = [
    line.partition("launch.py ")[2]
    for mode in MODES.values()
    for line in mode.parser.epilog.splitlines()[1:]
]


def run(*words):
    return main(["launch.py", *words])


def started(code, *words, **options):
    """A process of its own that has the command line of `words`."""
    command = [sys.executable, "-c", code, *words]
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run(command, check=False, timeout=60, **options)


def test_help_names_every_mode_and_every_flag_with_its_default(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for mode in MODES:
        assert f"--mode={mode} " in text
    for flag in FLAGS:
        _, _, entry = text.partition(f"\n  --{flag}")
        entry = entry.split("\n  --")[0]
        assert "default: " in " ".join(entry.split()) or flag in ("source", "table"), flag


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_lists_its_flags(mode, capsys):
    assert run(f"--mode={mode}", "--help") == 0
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert (f"\n  --{flag} " in text or f"\n  --{flag}\n" in text) == (
            flag in MODES[mode].flags
        ), flag
    assert text.count("python launch.py") >= 2


def test_help_is_fast_and_needs_no_package():
    code = "import launch, sys; code = launch.main(sys.argv); print('jax' in sys.modules, code)"
    start = time.process_time()
    done = started(f"import sys; sys.path.insert(0, '.')\n{code}", "--mode=search", "--help")
    assert done.stdout.endswith("False 0\n")
    assert time.process_time() - start < 5
    # -E -S: without the packages of the environment.
    bare = [sys.executable, "-E", "-S", "launch.py", "--help"]
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--mode=search" in done.stdout
    bare[-1:] = ["--mode=evaluate", "--workdir=x"]
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run make setup" in done.stderr


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"alignps-jax {__version__}\n"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example):
    assert parse(["launch.py", *example.replace("'", "").split()]).mode in MODES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode=serch"], "--mode: found 'serch', expected one of train, "),
        (["--mode=serch"], "did you mean 'search'?"),
        (["--worksdir=x"], "--worksdir: no such flag; did you mean '--workdir'?"),
        (["--workdir="], "--workdir: found '', expected a value"),
        (["--workdir"], "--workdir: expected one argument"),
        (["--mode=benchmark", "--runs=many"], "--runs: invalid int value: 'many'"),
        (["--" + "wor" * 1000 + "=1"], "no such flag"),
        (["--workdir=x", "y"], "found 'y', expected only flags"),
        (["--query=photo.jpg"], "--query: --mode=train does not read it, only --mode=search"),
        (["--mode=search"], "required: --checkpoint, --query, --gallery"),
        (["--mode=evaluate"], "missing: one of --checkpoint, --workdir, --detections"),
        ([], "missing: one of --config, --workdir"),
        (["--mode=evaluate", "--checkpoint=x", "--detections=y"], "--checkpoint and --detections"),
        (["--mode=forget", "--gallery=g", "--photo=x", "--person=y"], "not allowed with"),
        (["--mode=visualize", "--checkpoint=x"], "expected one of sampling_points, comparison,"),
        (["--mode=visualize", "--checkpoint=x", "--what=detection"], "mean 'detections'?"),
        (["--workdir=x", "--processes=2"], "--coordinator, --processes and --process go together"),
    ],
)
def test_wrong_flags_are_one_line(words, message, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture
def acts(monkeypatch):
    """Makes `--mode=list` do something else, and runs it."""

    def start(action):
        usual = MODES["list"]
        monkeypatch.setitem(MODES, "list", Mode(lambda args: action(), usual.parser, usual.flags))
        return run("--mode=list")

    return start


def raises(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.json: found 3, expected 4"), 2, "error: a.json: found 3, expected 4"),
        (IncompleteError("skipped a.jpg"), 3, "error: skipped a.jpg"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (OSError(28, "No space left on device", "x/y"), 2, "error: x/y: No space left on device"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied"),
        (OSError("Stale file handle"), 2, "error: Stale file handle"),
        (MemoryError("Unable to allocate 9 GiB"), 2, "error: Unable to allocate 9 GiB"),
        (MemoryError(), 2, "error: out of memory"),
    ],
)
def test_errors_are_one_line_in_the_words_of_who_raised_them(acts, error, code, line, capsys):
    assert acts(raises(error)) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_name_that_the_locale_cannot_spell_is_one_line(acts, capsys):
    assert acts(lambda: "fóto.jpg".encode("ascii")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fóto.jpg" in error
    assert "LC_ALL=C.UTF-8" in error


def test_an_exit_of_the_users_code_keeps_its_code_and_its_text(acts):
    assert acts(raises(SystemExit(143))) == 143
    with pytest.raises(SystemExit, match="my own words"):
        acts(raises(SystemExit("my own words")))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "gpux"])
def test_devices_that_are_not_here_are_one_line(platform):
    code = "import sys; sys.path.insert(0, '.')\nimport launch; sys.exit(launch.main(sys.argv))"
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = started(code, "--mode=evaluate", "--workdir=x", env=env)
    if "no checkpoint" in done.stderr:
        pytest.skip("it is here")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"JAX_PLATFORMS={platform}" in done.stderr


def test_output_that_nobody_reads_any_more_loses_nothing(tmp_path):
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import os, rich, tqdm
        from alignps_jax import cli, flags
        def action(args):
            for number in tqdm.trange(2000, mininterval=0):
                print("x" * 1000); rich.print(number); print("y", file=sys.stderr, flush=True)
            open("result", "w").write("done")
        flags.MODES["list"] = flags.MODES["list"]._replace(run=action)
        cli.entry()
    """
    for readers in ("| head -1", "2>&1 | head -1", "2>&1 >/dev/null | head -1", "2>&1 | true"):
        script = f'"$0" -c "$1" --mode=list {readers}; echo ${{PIPESTATUS[0]}}'
        done = started_shell(script, sys.executable, code, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "0", done
        assert "Error" not in done.stdout + done.stderr
        assert (tmp_path / "result").read_text() == "done"
        (tmp_path / "result").unlink()
    done = started_shell('"$0" launch.py --help | head -1', sys.executable, cwd=ROOT)
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def started_shell(script, *words, cwd):
    command = [shutil.which("bash"), "-c", script, *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path):
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from alignps_jax import cli, flags
        flags.MODES["list"] = flags.MODES["list"]._replace(run=lambda args: print("\\xfc\\udcff"))
        cli.entry()
    """
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = started(code, "--mode=list", env=os.environ | plain)
    assert (done.returncode, done.stdout) == (0, "\\xfc\\udcff\n"), done.stderr


def test_it_is_installable():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'alignps = "alignps_jax.cli:entry"' in text
    done = subprocess.run(
        [sys.executable, "-m", "alignps_jax", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"alignps-jax {__version__}\n"
