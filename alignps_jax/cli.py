"""The command line: the modes, which import what they use, and what errors look like."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignps_jax.errors import UserError, known_name
from alignps_jax.flags import MODES, PROCESSES, Arguments, mode, parse
from alignps_jax.streams import outlive_readers


@mode(any_of="config workdir", takes=f"checkpoint accept_changes {PROCESSES}")
def train(args: Arguments) -> None:
    """trains, resumes the run in --workdir, or fine-tunes --checkpoint; then evaluates"""
    from alignps_jax.checkpoint.places import holds_checkpoint
    from alignps_jax.configuration import train_config
    from alignps_jax.weights.sources import check_start

    config, workdir = train_config(args), args.workdir or Path("runs", args.config_name)
    if not holds_checkpoint(workdir):
        check_start(config)  # before the slow imports
    from alignps_jax.training.train import train_and_evaluate

    train_and_evaluate(config, workdir, args.accept_changes, args.fields)


@mode(one_of="checkpoint detections", any_of="workdir", takes=f"config {PROCESSES}")
def evaluate(args: Arguments) -> None:
    """measures detection and search of a checkpoint, or of saved detections"""
    from alignps_jax.configuration import checkpoint_config, evaluation_folder
    from alignps_jax.evaluation.evaluate import evaluate_checkpoint
    from alignps_jax.evaluation.scoring import evaluate_detections

    if args.detections:
        config = checkpoint_config(args, args.detections.parent)
        return evaluate_detections(config, args.detections, args.workdir)
    checkpoint, folder = args.checkpoint or args.workdir, args.checkpoint and args.workdir
    config = checkpoint_config(args, checkpoint)
    evaluate_checkpoint(config, checkpoint, evaluation_folder(config, checkpoint, folder))


@mode("checkpoint query gallery", f"box config exact_up_to workdir {PROCESSES}")
def search(args: Arguments) -> None:
    """searches a person in a gallery, or in a folder of photos"""
    from alignps_jax.checkpoint.places import results_folder
    from alignps_jax.distributed import is_main_process
    from alignps_jax.gallery.query import is_gallery, parse_box

    workdir = args.workdir or results_folder(args.checkpoint) / "search" / args.query.stem
    person = args.checkpoint, _config(args), args.query, parse_box(args.box)
    if not is_gallery(args.gallery):
        from alignps_jax.gallery.photos import search_photos

        search_photos(*person, Path(args.gallery), workdir)
    elif is_main_process():  # one query in a gallery is work for one process
        from alignps_jax.gallery.searching import search_gallery

        search_gallery(*person, _gallery(args), workdir)


@mode("checkpoint gallery source", "every prune exact_up_to config")
def index(args: Arguments) -> None:
    """finds everybody in photos and videos, once, and adds them to a gallery"""
    from alignps_jax.gallery.indexing import index_source
    from alignps_jax.gallery.sources import parse_every

    places = args.checkpoint, _config(args), args.gallery, args.source
    options = {"every": parse_every(args.every), "prune": args.prune}
    index_source(*places, exact_up_to=args.exact_up_to, **options)


@mode("gallery", "exact_up_to", one_of="photo person")
def forget(args: Arguments) -> None:
    """removes people from a gallery for good, and keeps them out of the next indexing"""
    from alignps_jax.gallery.forgetting import forget

    forget(_gallery(args), args.photo, args.person)


@mode("checkpoint source target", "every config")
def detect(args: Arguments) -> None:
    """finds everybody in photos and videos, and writes .json (COCO), .csv or .npz (embeddings)"""
    from alignps_jax.evaluation.detect import detect_source
    from alignps_jax.gallery.sources import parse_every

    every = parse_every(args.every)
    detect_source(args.checkpoint, _config(args), args.source, every, args.target)


@mode("checkpoint gallery", "host port public_url no_token exact_up_to config")
def serve(args: Arguments) -> None:
    """serves a page in the browser that searches a gallery"""
    from alignps_jax.gallery.page.serve import serve_checkpoint

    door = args.host, args.port, args.public_url, args.no_token
    serve_checkpoint(args.checkpoint, _config(args), _gallery(args), *door)


@mode("config source workdir", "ema")
def convert(args: Arguments) -> None:
    """makes a checkpoint of published PyTorch weights (.pth, .safetensors, .index.json)"""
    from alignps_jax.weights.convert import convert_released

    convert_released(_config(args), Path(args.source), args.workdir, args.fields, args.ema)


@mode("target", "exact_up_to config", one_of="checkpoint gallery")
def export(args: Arguments) -> None:
    """writes a checkpoint as .pth, .safetensors, .stablehlo, or a gallery as .parquet, .arrow"""
    if args.gallery:
        from alignps_jax.gallery.exporting import export_gallery

        return export_gallery(_gallery(args), args.target)
    from alignps_jax.inference.exported import SUFFIX, export_programs
    from alignps_jax.weights.convert import export_released

    writers = {".pth": export_released, ".safetensors": export_released, SUFFIX: export_programs}
    suffix = known_name(f"--target: suffix of {args.target}", args.target.suffix, writers)
    writers[suffix](args.checkpoint, args.target, _config(args))


@mode(takes="what query box gallery workdir config", one_of="checkpoint detections")
def visualize(args: Arguments) -> None:
    """draws sampling_points, comparison, gallery_size, detections, similarity, precision_recall"""
    from alignps_jax.configuration import checkpoint_config
    from alignps_jax.figures.kinds import FIGURES, draw_figures, figure_request

    kind = known_name("--what", args.what, FIGURES)
    sources, own = str(args.detections or args.checkpoint), partial(checkpoint_config, args)
    options = args.query, args.box, args.gallery, args.workdir
    draw_figures(kind, figure_request(sources, own, *options))


@mode(takes="config what runs workdir")
def benchmark(args: Arguments) -> None:
    """measures speed and memory on this machine"""
    from alignps_jax.experiments.benchmark import run_benchmark

    run_benchmark(_config(args), args.what, args.workdir or Path("runs/benchmark"), args.runs)


@mode(takes="config topology what batch runs target")
def scaling(args: Arguments) -> None:
    """compiles for chips that are not here, or measures 1, 2, 4, ... of the devices that are"""
    from alignps_jax.experiments.scaling import run_scaling

    name = "compiled.json" if args.topology else "measured.json"
    target = args.target or Path("runs/scaling", name)
    run_scaling(_config(args), args.topology, args.what, args.batch, args.runs, target)


@mode(takes="config")
def list_mode(args: Arguments) -> None:
    """lists the variants of a configuration: what each changes, the paper's numbers"""
    from alignps_jax.experiments.catalogue import print_catalogue

    name = (args.config or "configs/cuhk.py").partition(":")[0]
    print_catalogue(name, _config(args).data.name)


@mode("config table", f"seeds workdir {PROCESSES}")
def reproduce(args: Arguments) -> None:
    """trains every row of one of the paper's tables, with several seeds"""
    from alignps_jax.experiments.reproduce import reproduce_table
    from alignps_jax.training.train import train_and_evaluate

    workdir = args.workdir or Path(f"runs/reproduce-{args.config_name}")
    run = partial(train_and_evaluate, typed=args.fields)
    reproduce_table(_config(args), args.config_name, args.table, args.seeds, workdir, run)


def _config(args: Arguments) -> Any:
    from alignps_jax.configuration import checkpoint_config, configuration

    return checkpoint_config(args, args.checkpoint) if args.checkpoint else configuration(args)


def _gallery(args: Arguments) -> Any:
    from alignps_jax.gallery.store import Gallery

    return Gallery.open(args.gallery, exact_up_to=args.exact_up_to)


def entry() -> None:
    """Runs the command line of this process; output that nobody reads any more ends nothing."""
    outlive_readers()
    code = main(sys.argv)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of what ends Python
    if distributed := sys.modules.get("alignps_jax.distributed"):
        distributed.leave(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code.

    0, 2 after bad input, 3 where photos were skipped, 129, 130, 143 after SIGHUP, Ctrl-C, SIGTERM.
    """
    try:
        args = parse(argv)
        from alignps_jax.distributed import barrier, join

        if args.distributed or {args.coordinator, args.processes, args.process} != {None}:
            join(args.coordinator, args.processes, args.process)
        _check_platforms()
        MODES[args.mode].run(args)
        barrier("end")
        return 0
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError, MemoryError, UnicodeEncodeError) as error:  # in their own words
        reason, code = str(error) or "out of memory", getattr(error, "exit_code", 2)
    except ModuleNotFoundError as error:
        extras = "galleries need pip install '.[gallery]', .pth files pip install '.[torch]'"
        reason, code = f"found no package {error.name}: run make setup in the project ({extras})", 2
    except Exception:
        traceback.print_exc()
        return 1
    print(f"error: {reason}", file=sys.stderr)
    return code


def _check_platforms() -> None:
    import jax

    platforms = os.environ.get("JAX_PLATFORMS")
    try:
        _ = platforms and jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = f"JAX_PLATFORMS={platforms}: found no such device. {error}".strip()
        raise UserError(reason) from error
