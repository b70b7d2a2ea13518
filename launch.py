"""Trains, evaluates and searches; see README.md.

python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from alignps_jax.checkpoint import load_config
from alignps_jax.command_line import parse, required
from alignps_jax.convert import convert_released, export_released
from alignps_jax.detector import parse_box, search_photos
from alignps_jax.evaluate import evaluate_checkpoint
from alignps_jax.train import train_and_evaluate
from alignps_jax.types import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/cuhk.py:plus.")
flags.DEFINE_string("mode", "train", "train (then evaluate), evaluate, search, convert or export.")
flags.DEFINE_string("workdir", None, "Where results go; default: runs/<name of the config>.")
flags.DEFINE_string("checkpoint", None, "Workdir or checkpoint to read; default: the workdir.")
flags.DEFINE_string("query", None, "search: photo with the person to find.")
flags.DEFINE_string("box", None, "search: x1,y1,x2,y2 of that person; default: everybody.")
flags.DEFINE_string("gallery", None, "search: folder of photos to search.")
flags.DEFINE_string("source", None, "convert: file of published PyTorch weights.")
flags.DEFINE_string("target", None, "export: .pth or .safetensors file to write.")
flags.DEFINE_string("coordinator", None, "Multi-process runs: host:port of process 0.")
flags.DEFINE_integer("processes", None, "Multi-process runs: number of processes.")
flags.DEFINE_integer("process", None, "Multi-process runs: number of this process, from 0.")
app.define_help_flags()


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


def convert() -> None:
    required("config")
    convert_released(FLAGS.config, Path(required("source")), Path(required("workdir")))


def export() -> None:
    export_released(Path(required("checkpoint")), Path(required("target")))


MODES = {
    "train": train,
    "evaluate": evaluate,
    "search": search,
    "convert": convert,
    "export": export,
}


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code: 0, or 2 after bad input."""
    try:
        parse(argv, MODES)
        if FLAGS.coordinator:
            jax.distributed.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
        MODES[FLAGS.mode]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
