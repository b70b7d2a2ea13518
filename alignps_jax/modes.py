"""The modes of `launch.py`: what each makes of the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import check_lasting, is_step, results_folder
from alignps_jax.choices import choose, known_name
from alignps_jax.command_line import Arguments
from alignps_jax.configuration import checkpoint_config, detections_config, train_config
from alignps_jax.distributed import is_main_process
from alignps_jax.evaluation.detect import detect_source
from alignps_jax.evaluation.evaluate import evaluate_checkpoint
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.experiments.benchmark.run import run_benchmark
from alignps_jax.experiments.catalogue import print_catalogue
from alignps_jax.experiments.reproduce import reproduce_table
from alignps_jax.experiments.scaling.run import run_scaling
from alignps_jax.figures.kinds import FIGURES, draw_figures, figure_request
from alignps_jax.gallery.extra import is_gallery, need_extra
from alignps_jax.gallery.photos import search_photos
from alignps_jax.gallery.query import parse_box
from alignps_jax.gallery.sources import parse_every
from alignps_jax.inference.exported import SUFFIX, export_programs
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.weights.convert import convert_released, export_released
from configs import cuhk


def train(args: Arguments) -> None:
    workdir = Path(args.workdir or f"runs/{args.config_name}")
    check_lasting("--workdir", workdir)
    train_and_evaluate(train_config(args), workdir, accept_changes=args.accept_changes)


def evaluate(args: Arguments) -> None:
    if args.detections:
        file, folder = Path(args.detections), Path(args.workdir) if args.workdir else None
        check_lasting("--workdir", folder or file.parent)
        evaluate_detections(detections_config(args), file, folder)
        return
    checkpoint = Path(args.checkpoint or args.workdir)
    config = checkpoint_config(args, checkpoint)
    evaluate_checkpoint(config, checkpoint, _results_folder(args, checkpoint))


def search(args: Arguments) -> None:
    checkpoint, query = Path(args.checkpoint), Path(args.query)
    workdir = _results_folder(args, checkpoint, "search", query.stem)
    config, box = checkpoint_config(args, checkpoint), parse_box(args.box)
    if not is_gallery(args.gallery):
        search_photos(checkpoint, config, query, box, Path(args.gallery), workdir)
        return
    need_extra("--mode=search")
    if not is_main_process():  # one query in a gallery is work for one process
        return
    from alignps_jax.gallery.searching import search_gallery

    search_gallery(checkpoint, config, query, box, _gallery(args), workdir)


def index(args: Arguments) -> None:
    need_extra("--mode=index")
    from alignps_jax.gallery.indexing import index_source

    checkpoint, every = Path(args.checkpoint), parse_every(args.every)
    config = checkpoint_config(args, checkpoint)
    index_source(
        checkpoint,
        config,
        args.gallery,
        args.source,
        every=every,
        prune=args.prune,
        exact_up_to=args.exact_up_to,
    )


def forget(args: Arguments) -> None:
    need_extra("--mode=forget")
    from alignps_jax.gallery.forgetting import forget

    forget(_gallery(args), photo=args.photo, person=args.person)


def detect(args: Arguments) -> None:
    checkpoint, target = Path(args.checkpoint), Path(args.target)
    check_lasting("--target", target)
    config = checkpoint_config(args, checkpoint)
    detect_source(checkpoint, config, args.source, parse_every(args.every), target)


def serve(args: Arguments) -> None:
    need_extra("--mode=serve")
    from alignps_jax.gallery.page.serve import serve_checkpoint

    checkpoint = Path(args.checkpoint)
    config = checkpoint_config(args, checkpoint)
    serve_checkpoint(checkpoint, config, _gallery(args), args.host, args.port)


def convert(args: Arguments) -> None:
    source, workdir = Path(args.source), Path(args.workdir)
    convert_released(args.configuration(), source, workdir, args.convention)


def export(args: Arguments) -> None:
    target = Path(args.target)
    check_lasting("--target", target)
    if args.gallery:
        need_extra("--mode=export")
        from alignps_jax.gallery.exporting import export_gallery

        export_gallery(_gallery(args), target)
        return
    checkpoint = Path(args.checkpoint)
    write = choose(f"--target: suffix of {target}", target.suffix, EXPORTERS)
    write(checkpoint, target, checkpoint_config(args, checkpoint))


def visualize(args: Arguments) -> None:
    kind, sources = known_name("--what", args.what, FIGURES), args.detections or args.checkpoint
    own_config = partial(checkpoint_config, args)
    request = figure_request(sources, own_config, args.query, args.box, args.gallery, args.workdir)
    check_lasting("--workdir", request.workdir)
    if not args.workdir:
        _say_where(request.checkpoints[0], request.workdir)
    draw_figures(kind, request)


def benchmark(args: Arguments) -> None:
    config, workdir = args.configuration(cuhk.get_config()), Path(args.workdir or "runs/benchmark")
    run_benchmark(config, args.what, workdir, runs=args.runs, quick=args.quick)


def scaling(args: Arguments) -> None:
    default = f"runs/scaling/{'gate' if args.topology else 'measured'}.json"
    run_scaling(
        args.configuration(cuhk.get_config()),
        args.topology,
        what=args.what,
        scale=args.scale,
        batch=args.batch,
        runs=args.runs,
        target=Path(args.target or default),
    )


def list_variants(args: Arguments) -> None:
    config = args.configuration(cuhk.get_config())
    print_catalogue(args.config_file if args.config else "configs/cuhk.py", config.data.name)


def reproduce(args: Arguments) -> None:
    workdir = Path(args.workdir or f"runs/reproduce-{args.config_name}")
    reproduce_table(args.configuration(), args.config_name, args.table, args.seeds, workdir)


def _gallery(args: Arguments) -> Any:
    """The gallery of --gallery, whose packages are there."""
    from alignps_jax.gallery.store import Gallery

    return Gallery.open(args.gallery, exact_up_to=args.exact_up_to)


def _results_folder(args: Arguments, checkpoint: Path, *below: str) -> Path:
    """Where results of the checkpoint go: --workdir, else a lasting place of the checkpoint's."""
    if args.workdir and args.checkpoint:
        check_lasting("--workdir", Path(args.workdir))
        return Path(args.workdir)
    folder = results_folder(checkpoint)
    _say_where(checkpoint, folder)
    return folder.joinpath(*below)


def _say_where(checkpoint: Path, folder: Path) -> None:
    if is_step(checkpoint):
        print(f"results go to {folder}, because training deletes the folders of steps in time")


# What --mode=export writes, by the suffix of --target.
EXPORTERS: dict[str, Callable[[Path, Path, ConfigDict], None]] = {
    ".pth": export_released,
    ".safetensors": export_released,
    SUFFIX: export_programs,
}

MODES: dict[str, Callable[[Arguments], None]] = {
    "train": train,
    "evaluate": evaluate,
    "search": search,
    "index": index,
    "forget": forget,
    "detect": detect,
    "serve": serve,
    "convert": convert,
    "export": export,
    "visualize": visualize,
    "benchmark": benchmark,
    "scaling": scaling,
    "list": list_variants,
    "reproduce": reproduce,
}
