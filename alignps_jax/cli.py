"""The command line: the modes, which import what they use, and what errors look like."""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignps_jax.errors import UserError, known_name
from alignps_jax.flags import FILTERS, MODES, PROCESSES, Arguments, mode, parse
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


@mode("checkpoint query gallery", f"box every {FILTERS} count show_all json config workdir")
def search(args: Arguments) -> None:
    """searches a person in a gallery, or in a folder of photos and videos"""
    from alignps_jax.checkpoint.places import results_folder
    from alignps_jax.files import check_outputs
    from alignps_jax.gallery.gallery import Gallery
    from alignps_jax.gallery.index import index
    from alignps_jax.gallery.people import is_gallery
    from alignps_jax.gallery.search import search_photo

    workdir = args.workdir or results_folder(args.checkpoint) / "search" / args.query.stem
    check_outputs(workdir / "ranking.json", workdir / "ranking.png")
    detector, is_folder = _detector(args), not is_gallery(args.gallery)
    gallery = Gallery.open("memory://" if is_folder else args.gallery, detector, is_folder)
    walk = index(gallery, [args.gallery], args.every).walk if is_folder else None
    if walk and not gallery.people.scenes.count():
        walk.report()
    wanted = args.query, args.box, _filter(args), args.count
    _answer(args, search_photo(gallery, *wanted, workdir, args.show_all))
    if walk:
        walk.report()


@mode("checkpoint gallery", f"across_days {FILTERS} json config workdir")
def group(args: Arguments) -> None:
    """groups the people of a gallery who are likely the same person, day by day"""
    from alignps_jax.checkpoint.places import results_folder
    from alignps_jax.files import check_outputs
    from alignps_jax.gallery.gallery import Gallery
    from alignps_jax.gallery.groups import write_groups

    target = (args.workdir or results_folder(args.checkpoint)) / "groups.json"
    check_outputs(target)
    gallery = Gallery.open(args.gallery, _detector(args))
    _answer(args, write_groups(gallery, _filter(args), args.across_days, target))


@mode("checkpoint gallery source", "every prune exclude no_default_excludes watch cluster config")
def index(args: Arguments) -> None:
    """finds everybody in photos and videos, once, and adds them to a gallery"""
    from alignps_jax.gallery.gallery import Gallery
    from alignps_jax.gallery.index import find_people, index, watch
    from alignps_jax.media import DEFAULT_EXCLUDES

    excludes = [*(() if args.no_default_excludes else DEFAULT_EXCLUDES), *(args.exclude or ())]
    find: Any = find_people
    if args.cluster:
        from alignps_jax.gallery.cluster import on_cluster

        find = on_cluster(args.cluster, partial(_loaded, args.checkpoint, _config(args)))
    gallery = Gallery.open(args.gallery, _detector(args), create=True)

    def run() -> None:
        done = index(gallery, [args.source], args.every, args.prune, excludes, find=find)
        people, scenes = gallery.people.table.count(), gallery.people.scenes.count()
        count = f"{people:,} people in {scenes:,} scenes"
        print(f"{done}\ngallery  {args.gallery}: {count}", flush=True)
        done.walk.report()

    watch(run, [args.source]) if args.watch else run()


@mode("gallery", any_of="photo person")
def forget(args: Arguments) -> None:
    """removes people from a gallery for good, and keeps them out of the next indexing"""
    from alignps_jax.errors import IncompleteError
    from alignps_jax.gallery.forget import forget
    from alignps_jax.gallery.people import People

    people = People(args.gallery)
    gone = forget(people, args.photo or (), args.person or ())
    print(f"forgot {gone.people:,} people of", *gone.files, sep="\n  ")
    print("not reached: pictures and rankings of searches, exports, backups, what browsers keep")
    if gone.remains:
        raise IncompleteError(f"--gallery: older states remain: {gone.remains}")


@mode("checkpoint source target", "every config")
def detect(args: Arguments) -> None:
    """finds everybody in photos and videos, and writes .json (COCO), .csv or .npz (embeddings)"""
    from alignps_jax.evaluation.detect import detect_source

    detect_source(args.checkpoint, _config(args), args.source, args.every, args.target)


@mode("checkpoint gallery", "host port public_url no_token source watch config")
def serve(args: Arguments) -> None:
    """serves a page in the browser that searches a gallery"""
    from alignps_jax.gallery.gallery import Gallery
    from alignps_jax.gallery.page.app import serve

    gallery = Gallery.open(args.gallery, _detector(args))
    folders = [args.source] if args.source else []
    door = args.host, args.port, args.public_url, args.no_token
    serve(gallery, *door, folders, args.watch)


@mode("config source workdir", "ema")
def convert(args: Arguments) -> None:
    """makes a checkpoint of published PyTorch weights (.pth, .safetensors, .index.json)"""
    from alignps_jax.weights.convert import convert_released

    convert_released(_config(args), Path(args.source), args.workdir, args.fields, args.ema)


@mode("target", "config", one_of="checkpoint gallery")
def export(args: Arguments) -> None:
    """writes a checkpoint as .pth, .safetensors, .stablehlo, or a gallery as .parquet"""
    if args.gallery:
        from alignps_jax.gallery.people import People

        count = People(args.gallery).export(args.target)
        return print(f"{count:,} people  {args.target}")
    from alignps_jax.inference.exported import SUFFIX, export_programs
    from alignps_jax.weights.convert import export_released

    writers = {".pth": export_released, ".safetensors": export_released, SUFFIX: export_programs}
    suffix = known_name(f"--target: suffix of {args.target}", args.target.suffix, writers)
    writers[suffix](args.checkpoint, args.target, _config(args))


@mode(takes="what query box gallery workdir config", one_of="checkpoint detections")
def visualize(args: Arguments) -> None:
    """draws figures of the paper, of people in photos, and of results (without --what: a list)"""
    from alignps_jax.configuration import checkpoint_config
    from alignps_jax.figures.kinds import FIGURES, draw_figures
    from alignps_jax.figures.request import FigureRequest

    kind = known_name("--what", args.what, FIGURES)
    sources = tuple(map(Path, str(args.detections or args.checkpoint).split(",")))
    photos = args.query, args.box, args.gallery and Path(args.gallery)
    request = FigureRequest(sources, partial(checkpoint_config, args), *photos)
    draw_figures(kind, request, args.workdir)


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
    from alignps_jax.gallery.gallery import Gallery

    return Gallery.open(args.gallery)


def _filter(args: Arguments) -> Any:
    from alignps_jax.gallery.entries import Filter

    folder = args.folder and os.path.abspath(args.folder)
    cameras = tuple(args.camera or ())
    return Filter(folder, cameras, args.after, args.before, kind=args.kind)


def _answer(args: Arguments, content: object) -> None:
    if args.json:
        print(json.dumps(content, indent=2), file=args.stdout)


def _detector(args: Arguments) -> Any:
    return _loaded(args.checkpoint, _config(args))


def _loaded(checkpoint: Path, config: Any) -> Any:
    from alignps_jax.devices import use_compilation_cache
    from alignps_jax.inference.detector import Detector

    use_compilation_cache()
    return Detector.from_checkpoint(checkpoint, config)


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
        args.stdout = sys.stdout
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
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
        package = str(error.name).partition(".")[0]
        reason, code = f"found no package {package}: run make setup in the project ({extras})", 2
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
