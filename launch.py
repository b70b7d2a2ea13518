"""Trains, evaluates, searches and draws, as `--mode` says; README.md shows every mode.

python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from alignps_jax.large_pages import restart_with_large_pages

if __name__ == "__main__":
    restart_with_large_pages()  # before the slow imports

import jax

from alignps_jax.checkpoint.store import load_config
from alignps_jax.command_line import FLAGS, choose, config_file, config_name, parse, required
from alignps_jax.evaluation.evaluate import evaluate_checkpoint
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.experiments.benchmark.run import run_benchmark
from alignps_jax.experiments.catalogue import print_catalogue
from alignps_jax.experiments.reproduce import reproduce_table
from alignps_jax.figures.kinds import FIGURES, draw_figures, figure_request
from alignps_jax.gallery.photos import parse_box, search_photos
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.types import UserError
from alignps_jax.weights.convert import convert_released, export_released
from configs import cuhk


def train() -> None:
    train_and_evaluate(FLAGS.config, Path(FLAGS.workdir or f"runs/{config_name()}"))


def evaluate() -> None:
    if FLAGS.detections:
        evaluate_detections(FLAGS.config, Path(FLAGS.detections), FLAGS.workdir)
        return
    checkpoint = Path(FLAGS.checkpoint or required("workdir"))
    config = FLAGS.config or load_config(checkpoint)
    evaluate_checkpoint(config, checkpoint, Path(FLAGS.workdir or checkpoint))


def search() -> None:
    checkpoint, query = Path(required("checkpoint")), Path(required("query"))
    workdir = Path(FLAGS.workdir or checkpoint / "search" / query.stem)
    search_photos(checkpoint, query, parse_box(FLAGS.box), Path(required("gallery")), workdir)


def convert() -> None:
    required("config")
    source, workdir = Path(required("source")), Path(required("workdir"))
    convert_released(FLAGS.config, source, workdir, FLAGS.convention)


def export() -> None:
    export_released(Path(required("checkpoint")), Path(required("target")))


def benchmark() -> None:
    config, workdir = FLAGS.config or cuhk.get_config(), Path(FLAGS.workdir or "runs/benchmark")
    run_benchmark(config, FLAGS.what, workdir, runs=FLAGS.runs, quick=FLAGS.quick)


def visualize() -> None:
    kind, sources = choose("what", FIGURES), FLAGS.detections or required("checkpoint")
    optional = (FLAGS.config, FLAGS.query, FLAGS.box, FLAGS.gallery, FLAGS.workdir)
    draw_figures(kind, figure_request(sources, *optional))


def list_variants() -> None:
    config = FLAGS.config or cuhk.get_config()
    print_catalogue(config_file() if FLAGS.config else "configs/cuhk.py", config.data.name)


def reproduce() -> None:
    name = config_name()
    workdir = Path(FLAGS.workdir or f"runs/reproduce-{name}")
    reproduce_table(FLAGS.config, name, required("table"), FLAGS.seeds, workdir)


MODES = {
    "train": train,
    "evaluate": evaluate,
    "search": search,
    "convert": convert,
    "export": export,
    "visualize": visualize,
    "benchmark": benchmark,
    "list": list_variants,
    "reproduce": reproduce,
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
