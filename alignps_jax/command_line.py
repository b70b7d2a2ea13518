"""The command line: its flags, and one clear line for what is wrong with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from alignps_jax.choices import known_name
from alignps_jax.types import UserError

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/cuhk.py:plus.")
flags.DEFINE_string("mode", "train", "What to do: see README.")
flags.DEFINE_string("workdir", None, "Where results go; default: runs/<name of the config>.")
flags.DEFINE_string("checkpoint", None, "Workdir or checkpoint to read (visualize: A,B,...).")
flags.DEFINE_string("query", None, "search, visualize: photo with the person to find.")
flags.DEFINE_string("box", None, "search, visualize: x1,y1,x2,y2 of that person, in its pixels.")
flags.DEFINE_string("gallery", None, "search, visualize: folder of photos to search.")
flags.DEFINE_string("detections", None, "evaluate, visualize: saved detections (.npz).")
flags.DEFINE_string("source", None, "convert: file of published PyTorch weights.")
flags.DEFINE_string(
    "convention", None, "convert: pixels a ResNet-50 expects: torchvision or caffe."
)
flags.DEFINE_string("target", None, "export: .pth or .safetensors file to write.")
flags.DEFINE_string("table", None, "reproduce: table of the paper, 1 to 6 or fig4.")
flags.DEFINE_integer("seeds", 2, "reproduce: runs of each row.")
flags.DEFINE_string(
    "what", None, "visualize: kind of picture; benchmark: parts, a,b,...; default: all."
)
flags.DEFINE_integer("runs", 5, "benchmark: timed runs of every figure.")
flags.DEFINE_bool("quick", False, "benchmark: tiny shapes, only to see that it runs.")
flags.DEFINE_string("coordinator", None, "Multi-process runs: host:port of process 0.")
flags.DEFINE_integer("processes", None, "Multi-process runs: number of processes.")
flags.DEFINE_integer("process", None, "Multi-process runs: number of this process, from 0.")
app.define_help_flags()


def parse(argv: Sequence[str], modes: Collection[str]) -> None:
    """Parses all flags, `config` and `mode` among them.

    Raises:
      UserError: a flag, a field of the configuration or a mode does not exist (the nearest is
        named), or a value is wrong.
    """
    try:
        rest = FLAGS(list(argv))[1:]
        if FLAGS.config is not None:
            FLAGS.config.lock()  # a file that cannot be loaded fails only when it is used
    except (AttributeError, KeyError) as error:
        raise UserError(f"command line: no such field: {_one_line(str(error.args[0]))}") from error
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise UserError(f"command line: {_one_line(str(error))}") from error
    if rest:
        raise UserError(f"command line: found {rest[0]!r}, expected only flags (--name=value)")
    choose("mode", modes)


def choose(flag: str, known: Collection[str]) -> str:
    """The value of a flag that is one of `known`; UserError, with the nearest, if it is not."""
    return known_name(f"--{flag}", FLAGS[flag].value, known)


def required(flag: str) -> str:
    """The value of a flag that the mode cannot do without; UserError if it is not given."""
    value: str | None = FLAGS[flag].value
    if value is None:
        raise UserError(f"--{flag}: missing, --mode={FLAGS.mode} needs it")
    return value


def config_file() -> str:
    """The file of --config as it was typed, without a variant."""
    return config_flags.get_config_filename(FLAGS["config"]).partition(":")[0]


def config_name() -> str:
    """The name of the configuration and its variant, as folders carry it."""
    required("config")
    path, _, variant = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return "-".join(filter(None, (Path(path).stem, variant)))


def _one_line(message: str) -> str:
    """The message without the traceback, the quotes and the line ends of ml_collections."""
    head, *traceback = message.split("Traceback (most recent call last):")
    if traceback:
        message = f"{head} {traceback[0].strip().splitlines()[-1]}"
    if message[:1] == message[-1:] == "'":
        message = message[1:-1].replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split())
