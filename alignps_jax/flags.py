"""The flags of every mode: one argparse parser each, and one line for what is wrong with them.

Nothing slow is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

from alignps_jax import __version__
from alignps_jax.errors import known_name, nearest

Run = Callable[["Arguments"], None]
_FIELD = re.compile(r"--(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_PROGRAM = "alignps" if sys.argv[0].endswith("/alignps") else "python launch.py"


def _path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"found {text}, expected a folder or file on a disk")
    return Path(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer, 1 or more")
    return int(text)


def _box(text: str) -> tuple[float, ...]:
    with contextlib.suppress(ValueError):
        corners = tuple(map(float, text.split(",")))
        if len(corners) == 4 and all(map(math.isfinite, corners)):
            return corners
    raise argparse.ArgumentTypeError(f"found {text!r}, expected x1,y1,x2,y2 (pixels of the photo)")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(ms|s|min)?", text)
    seconds = float(found[1]) * {"ms": 0.001, "min": 60.0}.get(found[2], 1.0) if found else 0.0
    if not 0.001 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a time: 1s, 500ms or 2min")
    return seconds


def _begin(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError as error:
        expected = "expected a day or time: 2024-05-31 or 2024-05-31T14:30"
        raise argparse.ArgumentTypeError(f"found {text!r}, {expected}") from error


def _end(text: str) -> datetime.datetime:
    whole_day = datetime.timedelta(days=1, microseconds=-1)
    return _begin(text) + (whole_day if len(text) == len("2024-05-31") else datetime.timedelta(0))


def _several(help: str) -> dict[str, Any]:
    return {"help": f"{help}; may be repeated; default: none", "action": "append"}


def _flag(help: str, kind: Any = str, default: Any = None) -> dict[str, Any]:
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
    "box": _flag("x1,y1,x2,y2 in pixels of the person in --query; default: everybody", _box),
    "gallery": _flag("what --mode=index made, or a folder of photos; default: none"),
    "source": _flag("photo, video, or folder with everything below it; convert: the weights"),
    "every": _flag("time between two frames of a video: 1s, 500ms, 2min", _seconds, "1s"),
    "prune": _switch("remove people whose photo or video is gone from --source"),
    "watch": _switch("go on, and index what is added to --source"),
    "cluster": _flag("Ray cluster to index on: auto, local, or an address; default: this process"),
    "exclude": _several("pattern of files and folders to leave out, such as '**/drafts/**'"),
    "no_default_excludes": _switch("look into hidden folders, trash, and thumbnails as well"),
    "folder": _flag("search only what lies below this folder; default: everything"),
    "camera": _several("search only photos of this camera"),
    "after": _flag(
        "search only what was taken from then on: 2024-05-31T14:30; default: all", _begin
    ),
    "before": _flag(
        "search only what was taken until then: 2024-05-31 (its end); default: all", _end
    ),
    "kind": {"help": "search photos or videos alone; default: both", "choices": ("photo", "video")},
    "count": _flag("results of each person that is searched", _count, 1000),
    "show_all": _switch("show also results that are not likely the person"),
    "across_days": _switch("group people of different days, too"),
    "json": _switch("print the results as JSON, and all other lines to the standard error"),
    "photo": _several("photo or video whose people are forgotten"),
    "person": _several("id of a person to forget, from ranking.json"),
    "ema": _switch("take the running average of the weights from a training checkpoint"),
    "target": _flag("file to write; its suffix says what; default: below runs/scaling", _path),
    "table": _flag("table of the paper: 1 to 6, or fig4"),
    "seeds": _flag("runs of each row of the table", _count, 2),
    "what": _flag("kind of figure (without one they are listed), or parts a,b,...; default: all"),
    "runs": _flag("timed runs of each row", _count, 5),
    "topology": _flag("chips to compile for: v5e:2x4,h100:8,v100:1,cpu:8; default: measures"),
    "batch": _flag("images per device; default: config.train.batch_size", _count),
    "host": _flag("address to listen on, 0.0.0.0 for all of this machine", default="127.0.0.1"),
    "port": _flag("port to listen on, 0 for a free one", int, 8000),
    "public_url": _flag(
        "what visitors call the server, https://photos.example.org; default: its address"
    ),
    "no_token": _switch("let everybody in who can connect, without the token of the address"),
    "accept_changes": _switch("resume although fields changed that decide what training does"),
    "distributed": _switch("join the processes that SLURM, Open MPI, Kubernetes or a TPU starts"),
    "coordinator": _flag("without such a manager: host:port of process 0; default: one process"),
    "processes": _flag("number of processes of the run; default: 1", int),
    "process": _flag("number of this process, from 0; default: 0", int),
}
FILTERS = "folder camera after before kind"
PROCESSES = "distributed coordinator processes process"


class Arguments(argparse.Namespace):
    """What was typed: the flags of the mode, and the fields of the configuration by dotted name."""

    mode: str
    fields: dict[str, str]
    stdout: TextIO

    @property
    def config_name(self) -> str:
        """The name of the configuration and its variant, as folders carry it."""
        path, _, variant = self.config.partition(":")
        return "-".join(filter(None, (Path(path).stem, variant)))


class Mode(argparse.ArgumentParser):
    """Reads the flags of a mode, at least one of `any_of` among them, and runs it."""

    run: Run
    flags: set[str]
    any_of: list[str]

    def __init__(self, name: str, needs: str = "", **options: Any):
        prog, form = f"{_PROGRAM} --mode={name}", argparse.RawDescriptionHelpFormatter
        usage = f"{prog} {needs}[flags] [--config.SECTION.FIELD=VALUE ...]"
        super().__init__(prog, usage, formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


MODES: dict[str, Mode] = {}


def mode(
    needs: str = "", takes: str = "", *, one_of: str = "", any_of: str = ""
) -> Callable[[Run], Run]:
    """Makes a function the mode of its name, which its docstring describes.

    It reads all flags that are named; it needs those of `needs`, and one of `any_of` or `one_of`,
    which exclude each other.
    """

    def add(run: Run) -> Run:
        name, needed, choice = run.__name__.removesuffix("_mode"), needs.split(), one_of.split()
        some = [*choice, *any_of.split()]
        shown = [f"--{flag}={flag.upper()} " for flag in needed]
        shown += [f"({' | '.join(f'--{flag}={flag.upper()}' for flag in some)}) "] * bool(some)
        MODES[name] = mode = Mode(name, "".join(shown), description=run.__doc__)
        mode.run, mode.any_of, mode.flags = run, some, {*needed, *takes.split(), *some}
        group = mode.add_mutually_exclusive_group()
        for flag, options in FLAGS.items():
            if flag in needed:
                told = f"{options['help'].partition('; default: ')[0]} (required)"
                mode.add_argument(f"--{flag}", required=True, **options | {"help": told})
            elif flag in mode.flags:
                (group if flag in choice else mode).add_argument(f"--{flag}", **options)
        return run

    return add


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line, whose first word is the program; exits after --help and mistakes."""
    lines = [f"  --mode={name:10} {mode.description}" for name, mode in MODES.items()]
    about = "\n".join(["Person search with AlignPS. Modes:", *lines])
    more = "--mode=MODE --help has what a mode needs, configs/cuhk.py every SECTION.FIELD."
    overview = Mode("MODE", description=about, epilog=more, add_help=False)
    overview.add_argument("--mode", help="what to do, see above; default: train")
    overview.add_argument("--version", action="version", version=f"alignps-jax {__version__}")
    found, words = overview.parse_known_args(argv[1:])
    if found.mode is None and {"-h", "--help"} & set(words):
        for flag, options in FLAGS.items():
            overview.add_argument(f"--{flag}", **options)
        overview.print_help()
        overview.exit()
    name = known_name("--mode", "train" if found.mode is None else found.mode, MODES)
    mode = MODES[name]
    for word in words:
        if re.fullmatch("--[^=]+=", word):  # such as --workdir=$UNSET
            mode.error(f"{word[:-1]}: found '', expected a value")
    args, rest = mode.parse_known_args(words, Arguments(mode=name, fields={}))
    vars(args).update({flag: None for flag in FLAGS if flag not in args})  # those of other modes
    for before, word in pairwise(["", *rest]):
        if field := _FIELD.fullmatch(word):
            args.fields[field[2]] = "False" if field[1] else field[3] or ""
        elif (field := _FIELD.fullmatch(before)) and field[3] is None and word[:2] != "--":
            args.fields[field[2]] = word
        else:
            mode.error(_wrong(name, word))
    if mode.any_of and not any(getattr(args, flag) for flag in mode.any_of):
        mode.error(f"missing: one of --{', --'.join(mode.any_of)}")
    return args


def _wrong(name: str, word: str) -> str:
    flag = word.partition("=")[0]
    readers = [f"--mode={other}" for other, mode in MODES.items() if flag[2:] in mode.flags]
    if readers:
        return f"{flag}: --mode={name} does not read it, only {', '.join(readers)}"
    near = nearest(flag, [f"--{known}" for known in FLAGS])
    return f"found {word!r}, expected only flags (--name=value){near}"
