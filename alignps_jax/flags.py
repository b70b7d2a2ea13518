"""The flags of every mode: one argparse parser each, and one line for what is wrong with them.

Nothing slow is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from alignps_jax import __version__
from alignps_jax.errors import nearest

Run = Callable[["Arguments"], None]
_OVERRIDE = re.compile(r"--(?:no)?config\.([^=]+)")
_PROGRAM = "alignps" if sys.argv[0].endswith("/alignps") else "python launch.py"


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("found '', expected a value")
    return value


def _path(value: str) -> Path:
    if "://" in value:
        raise argparse.ArgumentTypeError(f"found {value}, expected a folder or file, no address")
    return Path(_text(value))


def _flag(help: str, kind: Any = _text, default: Any = None) -> dict[str, Any]:
    told = help if default is None else f"{help}; default: {default}"
    return {"help": told, "type": kind, "default": default}


def _switch(help: str) -> dict[str, Any]:
    return {"help": f"{help}; default: no", "action": "store_true"}


FLAGS: dict[str, dict[str, Any]] = {
    "config": _flag("configuration, such as own.py or prw:plus; default: the run's, or cuhk"),
    "workdir": _flag("folder of the run or of results; default: the run's, or below runs/", _path),
    "checkpoint": _flag("workdir of a run, or folder of one step; default: --workdir", _path),
    "detections": _flag("saved detections (.npz) in place of a checkpoint; default: none", _path),
    "query": _flag("photo with the person to find; default: none", _path),
    "box": _flag("x1,y1,x2,y2 in pixels of the person in --query; default: everybody"),
    "gallery": _flag("what --mode=index made, or a folder of photos; default: none"),
    "source": _flag("photo, video, or folder with everything below it; convert: the weights"),
    "every": _flag("time between two frames of a video: 1s, 500ms, 2min", default="1s"),
    "prune": _switch("remove people whose photo or video is gone from --source"),
    "exact_up_to": _flag("number of people up to which search is exact", int, 2_000_000),
    "photo": _flag("photo or video whose people are forgotten; default: none"),
    "person": _flag("id of one person to forget, from ranking.json; default: none"),
    "ema": _switch("take the running average of the weights from a training checkpoint"),
    "target": _flag("file to write; its suffix says what; default: below runs/scaling", _path),
    "table": _flag("table of the paper: 1 to 6, or fig4"),
    "seeds": _flag("runs of each row of the table", int, 2),
    "what": _flag("kind of figure (without one they are listed), or parts a,b,...; default: all"),
    "runs": _flag("timed runs of each row", int, 5),
    "quick": _switch("tiny shapes, only to see that it runs"),
    "topology": _flag("chips to compile for: v5e:2x4,h100:8,v100:1,cpu:8; default: measures"),
    "scale": _flag("<long>x<short> in pixels; default: the test and the largest training scale"),
    "batch": _flag("images per device; default: config.train.batch_size", int),
    "host": _flag("address to listen on; all but this machine need a token", default="127.0.0.1"),
    "port": _flag("port to listen on, 0 for a free one", int, 8000),
    "accept_changes": _switch("resume although fields changed that decide what training does"),
    "distributed": _switch("join the processes that SLURM, Open MPI, Kubernetes or a TPU starts"),
    "coordinator": _flag("without such a manager: host:port of process 0; default: one process"),
    "processes": _flag("number of processes of the run; default: 1", int),
    "process": _flag("number of this process, from 0; default: 0", int),
}
PROCESSES = "distributed coordinator processes process"


class Arguments(argparse.Namespace):
    """What was typed: the flags of the mode, and the words that set fields of the configuration."""

    mode: str
    overrides: list[str]

    @property
    def config_name(self) -> str:
        """The name of the configuration and its variant, as folders carry it."""
        path, _, variant = self.config.partition(":")
        return "-".join(filter(None, (Path(path).stem, variant)))

    @property
    def overridden(self) -> frozenset[str]:
        """The dotted names of the fields that the command line sets."""
        return frozenset(found[1] for word in self.overrides if (found := _OVERRIDE.match(word)))


class Mode(argparse.ArgumentParser):
    """Reads the flags of a mode, of which it needs one of `any_of`, and runs it."""

    def __init__(self, name: str, run: Run = lambda args: None, any_of: str = "", **options: Any):
        super().__init__(
            prog=f"{_PROGRAM} --mode={name}",
            usage=f"{_PROGRAM} --mode={name} [flags] [--config.SECTION.FIELD=VALUE ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.run, self.any_of, self.flags = run, any_of.split(), set[str]()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


MODES: dict[str, Mode] = {}


def mode(
    needs: str = "", takes: str = "", *, one_of: str = "", any_of: str = ""
) -> Callable[[Run], Run]:
    """Makes a function the mode of its name.

    The first line of its docstring says what it does; the lines after an empty one are examples.
    It cannot do without the flags in `needs`, and reads those in `takes` besides; it needs one of
    those in `one_of`, which exclude each other, and `any_of`.
    """

    def add(run: Run) -> Run:
        name = run.__name__.removesuffix("_mode")
        summary, _, *examples = map(str.strip, (run.__doc__ or "").strip().splitlines())
        examples = ["examples:", *(f"{_PROGRAM} {line}" for line in examples)]
        texts = {"description": summary, "epilog": "\n  ".join(examples)}
        MODES[name] = mode = Mode(name, run, f"{one_of} {any_of}", **texts)
        group = mode.add_mutually_exclusive_group()
        mode.flags |= {*f"{needs} {takes} {one_of} {any_of}".split()}
        for flag, options in FLAGS.items():
            if flag in needs.split():
                needed = f"{options['help'].partition('; default: ')[0]} (required)"
                mode.add_argument(f"--{flag}", required=True, **options | {"help": needed})
            elif flag in mode.flags:
                holder = group if flag in one_of.split() else mode
                holder.add_argument(f"--{flag}", **options)
        return run

    return add


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line, whose first word is the program; exits after --help and mistakes."""
    lines = [f"  --mode={name:10} {mode.description}" for name, mode in MODES.items()]
    overview = Mode(
        "MODE",
        description="\n".join(["Person search with AlignPS. Modes (default: train):", *lines]),
        epilog="--mode=MODE --help has the flags of a mode, with examples.\n"
        "configs/cuhk.py has every field of the configuration; --version says which one this is.",
        add_help=False,
    )
    overview.add_argument("--mode", type=_text, help=argparse.SUPPRESS)
    version = f"alignps-jax {__version__}"
    overview.add_argument("--version", action="version", version=version, help=argparse.SUPPRESS)
    found, words = overview.parse_known_args(argv[1:])
    if not found.mode and {"-h", "--help"} & set(words):
        for flag, options in FLAGS.items():
            overview.add_argument(f"--{flag}", **options)
        overview.print_help()
        overview.exit()
    name = found.mode or "train"
    if name not in MODES:
        known = ", ".join(MODES)
        overview.error(f"--mode: found {name!r}, expected one of {known}{nearest(name, MODES)}")
    mode = MODES[name]
    args, rest = mode.parse_known_args(words, Arguments(mode=name, overrides=[]))
    vars(args).update({flag: None for flag in FLAGS if flag not in args})  # those of other modes
    for before, word in pairwise(["", *rest]):
        # --config.field=value, or --config.field value
        value = _OVERRIDE.match(before) and "=" not in before and not word.startswith("--")
        if not (value or _OVERRIDE.match(word)):
            mode.error(_wrong(name, word))
        args.overrides.append(word)
    if mode.any_of and not any(getattr(args, flag) for flag in mode.any_of):
        mode.error(f"missing: one of --{', --'.join(mode.any_of)}")
    return args


def _wrong(name: str, word: str) -> str:
    if not word.startswith("-"):
        return f"found {word!r}, expected only flags (--name=value)"
    flag = word.lstrip("-").partition("=")[0]
    readers = [f"--mode={other}" for other, mode in MODES.items() if flag in mode.flags]
    if readers:
        return f"--{flag}: --mode={name} does not read it, only {', '.join(readers)}"
    return f"--{flag}: no such flag{nearest(f'--{flag[:100]}', [f'--{known}' for known in FLAGS])}"
