"""Trains, evaluates and searches; see README.md.

python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from alignps_jax.checkpoint import load_config
from alignps_jax.detector import parse_box, search_photos
from alignps_jax.evaluate import evaluate_checkpoint
from alignps_jax.train import train_and_evaluate
from alignps_jax.types import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/cuhk.py:plus.")
flags.DEFINE_string("mode", "train", "train (then evaluate), evaluate or search.")
flags.DEFINE_string("workdir", None, "Where results go; default: runs/<name of the config>.")
flags.DEFINE_string("checkpoint", None, "Workdir or checkpoint to read; default: the workdir.")
flags.DEFINE_string("query", None, "search: photo with the person to find.")
flags.DEFINE_string("box", None, "search: x1,y1,x2,y2 of that person; default: everybody.")
flags.DEFINE_string("gallery", None, "search: folder of photos to search.")
flags.DEFINE_string("coordinator", None, "Multi-process runs: host:port of process 0.")
flags.DEFINE_integer("processes", None, "Multi-process runs: number of processes.")
flags.DEFINE_integer("process", None, "Multi-process runs: number of this process, from 0.")


app.define_help_flags()


def required(flag: str) -> str:
    """The value of a flag that the mode cannot do without."""
    if FLAGS[flag].value is None:
        raise UserError(f"--{flag}: missing, --mode={FLAGS.mode} needs it")
    return FLAGS[flag].value


def train() -> None:
    required("config")
    path, _, variant = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    name = "-".join(filter(None, (Path(path).stem, variant)))
    train_and_evaluate(FLAGS.config, Path(FLAGS.workdir or f"runs/{name}"))


def evaluate() -> None:
    checkpoint = Path(FLAGS.checkpoint or required("workdir"))
    config = FLAGS.config or load_config(checkpoint)
    evaluate_checkpoint(config, checkpoint, Path(FLAGS.workdir or checkpoint))


def search() -> None:
    checkpoint, query = Path(required("checkpoint")), Path(required("query"))
    workdir = Path(FLAGS.workdir or checkpoint / "search" / query.stem)
    search_photos(checkpoint, query, parse_box(FLAGS.box), Path(required("gallery")), workdir)


MODES = {"train": train, "evaluate": evaluate, "search": search}


def one_line(message: str) -> str:
    """The message without the traceback, the quotes and the line ends of ml_collections."""
    head, *traceback = message.split("Traceback (most recent call last):")
    if traceback:
        message = f"{head} {traceback[0].strip().splitlines()[-1]}"
    if message[:1] == message[-1:] == "'":
        message = message[1:-1].replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split())


def parse(argv: Sequence[str]) -> None:
    """Reads the command line; UserError names what does not exist or has a wrong value."""
    try:
        rest = FLAGS(list(argv))[1:]
        if FLAGS.config is not None:
            FLAGS.config.lock()  # a file that cannot be loaded fails only when it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"command line: {one_line(str(error))}") from error
    if rest:
        raise UserError(f"command line: found {rest[0]!r}, expected only flags (--name=value)")
    if FLAGS.mode not in MODES:
        near = difflib.get_close_matches(FLAGS.mode, MODES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--mode: found {FLAGS.mode!r}, expected one of {', '.join(MODES)}{hint}")


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code: 0, or 2 after bad input."""
    try:
        parse(argv)
        if FLAGS.coordinator:
            jax.distributed.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
        MODES[FLAGS.mode]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
