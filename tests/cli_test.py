"""The command line: help, mistakes in one line, exit codes, and output that nobody reads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignps_jax import __version__
from alignps_jax.cli import main, parse
from alignps_jax.flags import FLAGS, MODES
from alignps_jax.types import IncompleteError, UserError
from tests.places import ROOT

# A process whose --mode=list does something else.
ACTS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import rich, tqdm
from alignps_jax import cli, flags
def act(args):
    {{}}
flags.MODES["list"].run = act
cli.entry()
"""


def run(*words):
    return main(["launch.py", *words])


def started(*command, env=(), cwd=ROOT):
    """A process of its own."""
    env, captured = {**os.environ, **dict(env)}, {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=cwd, env=env, check=False, timeout=120, **captured)


def test_help_names_every_flag_with_its_default_and_every_mode(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for flag in FLAGS:
        entry = " ".join(text.partition(f"\n  --{flag}")[2].split("\n  --")[0].split())
        assert "default: " in entry or flag in ("source", "table"), flag
    for name, mode in MODES.items():
        assert f"--mode={name} " in text
        assert run(f"--mode={name}", "--help") == 0
        own = capsys.readouterr().out.replace("\n", " \n")
        assert {flag for flag in FLAGS if f"\n  --{flag} " in own} == mode.flags
        needed = re.split(r" [(\[]", own.removeprefix("usage: python launch.py "))[0]
        choice = [f"--{flag}=x" for flag in mode.any_of[:1]]
        assert parse(["launch.py", *needed.split(), *choice]).mode == name


def test_help_needs_no_package_and_the_rest_says_what_is_missing():
    bare = [sys.executable, "-E", "-S", "launch.py"]  # without the environment's packages
    done = started(*bare, "--mode=search", "--help")
    assert (done.returncode, "--query" in done.stdout) == (0, True)
    done = started(*bare, "--mode=evaluate", "--workdir=x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run make setup" in done.stderr
    done = started(sys.executable, "-m", "alignps_jax", "--version")
    assert done.stdout == f"alignps-jax {__version__}\n"


def test_flags_have_their_defaults_and_types():
    args = parse(["launch.py", "--mode=benchmark", "--workdir=x/y", "--runs=7"])
    assert (args.runs, args.batch, args.workdir, args.what) == (7, None, Path("x/y"), None)
    assert args.gallery is None  # of other modes
    words = "--config=configs/tiny.py:plus --config.a.b 3 --noconfig.c --config.d --config.e=x=1="
    args = parse(["launch.py", *words.split()])
    assert args.config_name == "tiny-plus"
    assert args.fields == {"a.b": "3", "c": "False", "d": "", "e": "x=1="}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mode=serch", "did you mean 'search'?"),
        ("--worksdir=x", "found '--worksdir=x', expected only flags (--name=value); did you mean"),
        ("--workdir=", "--workdir: found '', expected a value"),
        ("--workdir", "--workdir: expected one argument"),
        ("--workdir=gs://a/run", "--workdir: found gs://a/run, expected a folder or file"),
        ("--mode=benchmark --runs=many", "--runs: found 'many', expected an integer"),
        ("--workdir=x y", "found 'y', expected only flags"),
        ("--workdir=x --config.seed=1 y", "found 'y', expected only flags"),
        ("--query=photo.jpg", "--query: --mode=train does not read it, only --mode=search"),
        ("--mode=search", "required: --checkpoint, --query, --gallery"),
        ("--mode=evaluate", "missing: one of --checkpoint, --detections, --workdir"),
        ("--mode=export --target=t --gallery=g --checkpoint=x", "not allowed with"),
        ("--mode=visualize --checkpoint=x", "expected one of sampling_points, comparison,"),
        ("--workdir=x --processes=2", "--coordinator, --processes and --process"),
        ("--workdir=x --distributed", "the processes of the run cannot join"),
    ],
)
def test_wrong_flags_are_one_line(words, message, capsys, monkeypatch):
    for name in os.environ:  # not this machine's own cluster, should it have one
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")):
            monkeypatch.delenv(name)
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.json: found 3, expected 4"), 2, "error: a.json: found 3, expected 4"),
        (IncompleteError("skipped a.jpg"), 3, "error: skipped a.jpg"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (SystemExit(143), 143, ""),
        (OSError(28, "No space left on device", "x/y"), 2, "No space left on device: 'x/y'"),
        (MemoryError(), 2, "error: out of memory"),
        (UnicodeEncodeError("ascii", "fóto.jpg", 1, 2, "x"), 2, "error: 'ascii' codec can't"),
    ],
)
def test_errors_are_one_line_in_the_words_of_who_raised_them(
    error, code, line, capsys, monkeypatch
):
    def act(args):
        raise error

    monkeypatch.setattr(MODES["list"], "run", act)
    assert run("--mode=list") == code
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == bool(line)


def test_training_that_cannot_start_says_so_before_it_imports_training():
    random = ("--config=configs/cuhk.py", "--config.model.pretrained=random")
    done = started(sys.executable, "-X", "importtime", "launch.py", *random)
    assert done.returncode == 2
    assert "error: config.model.pretrained: found 'random', expected weights" in done.stderr
    assert "alignps_jax.weights.sources" in done.stderr
    assert not any(slow in done.stderr for slow in ("grain", "matplotlib", "training.train"))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "gpux"])
def test_devices_that_are_not_here_are_one_line(platform):
    words = ("launch.py", "--mode=evaluate", "--workdir=x")
    done = started(sys.executable, *words, env={"JAX_PLATFORMS": platform})
    if "no checkpoint" in done.stderr:
        pytest.skip("it is here")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"JAX_PLATFORMS={platform}" in done.stderr


@pytest.mark.parametrize("reader", ["| head -1", "2>&1 | head -1", "2>&1 >/dev/null | true"])
def test_output_that_nobody_reads_any_more_loses_nothing(reader, tmp_path):
    code = ACTS.format(
        "for number in tqdm.trange(2000, mininterval=0):\n"
        "        print('x' * 1000); rich.print(number); print('y', file=sys.stderr, flush=True)\n"
        "    open('result', 'w').write('done')"
    )
    script = f'"$0" -c "$1" --mode=list {reader}; echo ${{PIPESTATUS[0]}}'
    done = started(shutil.which("bash"), "-c", script, sys.executable, code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0", done
    assert "Error" not in done.stdout + done.stderr
    assert (tmp_path / "result").read_text() == "done"


def test_names_that_the_terminal_cannot_show_are_escaped():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = ACTS.format("print('\\xfc\\udcff')")
    done = started(sys.executable, "-c", code, "--mode=list", env=plain)
    assert (done.returncode, done.stdout) == (0, "\\xfc\\udcff\n"), done.stderr
