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
    """trains, resumes the run in --workdir, or fine-tunes --checkpoint; then evaluates

    --config=configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
    --workdir=runs/cuhk
    --checkpoint=runs/cuhk --config=configs/prw.py --config.data.root=/data/PRW
    """
    from alignps_jax.checkpoint.places import holds_checkpoint
    from alignps_jax.configuration import train_config
    from alignps_jax.weights.sources import check_start

    config, workdir = train_config(args), args.workdir or Path("runs", args.config_name)
    if not holds_checkpoint(workdir):
        check_start(config)  # before the slow imports
    from alignps_jax.training.train import train_and_evaluate

    train_and_evaluate(config, workdir, args.accept_changes, args.overridden)


@mode(one_of="checkpoint detections", any_of="workdir", takes=f"config {PROCESSES}")
def evaluate(args: Arguments) -> None:
    """measures detection and search of a checkpoint, or of saved detections

    --mode=evaluate --workdir=runs/cuhk
    --mode=evaluate --workdir=runs/cuhk --config.eval.score_threshold=0.3
    --mode=evaluate --detections=runs/cuhk/detections.npz
    """
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
    """searches a person in a gallery, or in a folder of photos

    --mode=search --checkpoint=runs/cuhk --query=photo.jpg --box=310,120,390,330 --gallery=photos/
    --mode=search --checkpoint=runs/cuhk --query=photo.jpg --gallery=people.lance
    """
    from alignps_jax.configuration import say_folder
    from alignps_jax.distributed import is_main_process
    from alignps_jax.gallery.query import is_gallery, parse_box

    workdir = args.workdir or say_folder(args.checkpoint) / "search" / args.query.stem
    person = args.checkpoint, _config(args), args.query, parse_box(args.box)
    if not is_gallery(args.gallery):
        from alignps_jax.gallery.photos import search_photos

        search_photos(*person, Path(args.gallery), workdir)
    elif is_main_process():  # one query in a gallery is work for one process
        from alignps_jax.gallery.searching import search_gallery

        search_gallery(*person, _gallery(args), workdir)


@mode("checkpoint gallery source", "every prune exact_up_to config")
def index(args: Arguments) -> None:
    """finds everybody in photos and videos, once, and adds them to a gallery

    --mode=index --checkpoint=runs/cuhk --gallery=people.lance --source=/photos
    --mode=index --checkpoint=runs/cuhk --gallery=people.lance --source=/videos --every=500ms
    """
    from alignps_jax.gallery.indexing import index_source
    from alignps_jax.gallery.sources import parse_every

    places = args.checkpoint, _config(args), args.gallery, args.source
    options = {"every": parse_every(args.every), "prune": args.prune}
    index_source(*places, exact_up_to=args.exact_up_to, **options)


@mode("gallery", "exact_up_to", one_of="photo person")
def forget(args: Arguments) -> None:
    """removes people from a gallery for good, and keeps them out of the next indexing

    --mode=forget --gallery=people.lance --photo=/photos/party.jpg
    """
    from alignps_jax.gallery.forgetting import forget

    forget(_gallery(args), photo=args.photo, person=args.person)


@mode("checkpoint source target", "every config")
def detect(args: Arguments) -> None:
    """finds everybody in photos and videos, and writes .json (COCO), .csv or .npz (embeddings)

    --mode=detect --checkpoint=runs/cuhk --source=/photos --target=people.json
    """
    from alignps_jax.evaluation.detect import detect_source
    from alignps_jax.gallery.sources import parse_every

    every = parse_every(args.every)
    detect_source(args.checkpoint, _config(args), args.source, every, args.target)


@mode("checkpoint gallery", "host port exact_up_to config")
def serve(args: Arguments) -> None:
    """serves a page in the browser that searches a gallery

    --mode=serve --gallery=people.lance --checkpoint=runs/cuhk
    """
    from alignps_jax.gallery.page.serve import serve_checkpoint

    serve_checkpoint(args.checkpoint, _config(args), _gallery(args), args.host, args.port)


@mode("config source workdir", "ema")
def convert(args: Arguments) -> None:
    """makes a checkpoint of published PyTorch weights (.pth, .safetensors, .index.json)

    --mode=convert --config=cuhk:released --source=cuhk_alignps.pth --workdir=runs/cuhk_released
    """
    from alignps_jax.weights.convert import convert_released

    source = Path(args.source)
    convert_released(_config(args), source, args.workdir, args.overridden, args.ema)


@mode("target", "exact_up_to config", one_of="checkpoint gallery")
def export(args: Arguments) -> None:
    """writes a checkpoint as .pth, .safetensors or .stablehlo, or a gallery as .parquet or .arrow

    --mode=export --checkpoint=runs/cuhk --target=detector.stablehlo --config.eval.batch_size=1
    --mode=export --gallery=people.lance --target=people.parquet
    """
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
    """draws sampling_points, comparison, gallery_size, detections, similarity, precision_recall

    --mode=visualize --what=sampling_points --checkpoint=runs/cuhk --query=photo.jpg
    --mode=visualize --what=comparison --checkpoint=runs/cuhk,runs/baseline
    """
    from alignps_jax.configuration import checkpoint_config, say_folder
    from alignps_jax.figures.kinds import FIGURES, draw_figures, figure_request

    kind = known_name("--what", args.what, FIGURES)
    sources, own = str(args.detections or args.checkpoint), partial(checkpoint_config, args)
    request = figure_request(sources, own, args.query, args.box, args.gallery, args.workdir)
    if not args.workdir:
        say_folder(request.checkpoints[0])
    draw_figures(kind, request)


@mode(takes="config what runs quick workdir")
def benchmark(args: Arguments) -> None:
    """measures speed and memory on this machine

    --mode=benchmark --what=inference,train
    """
    from alignps_jax.experiments.benchmark.run import run_benchmark

    workdir = args.workdir or Path("runs/benchmark")
    run_benchmark(_config(args), args.what, workdir, runs=args.runs, quick=args.quick)


@mode(takes="config topology what scale batch runs target")
def scaling(args: Arguments) -> None:
    """compiles for chips that are not here, or measures 1, 2, 4, ... of the devices that are

    --mode=scaling --config=cuhk --topology=v5e:2x4,h100:8,v100:1 --batch=1
    """
    from alignps_jax.experiments.scaling.run import run_scaling

    target = args.target or Path("runs/scaling", f"{'gate' if args.topology else 'measured'}.json")
    options = {name: getattr(args, name) for name in ("what", "scale", "batch", "runs")}
    run_scaling(_config(args), args.topology, target=target, **options)


@mode(takes="config")
def list_mode(args: Arguments) -> None:
    """lists the variants of a configuration: what each changes, the paper's numbers

    --mode=list --config=configs/prw.py
    """
    from alignps_jax.experiments.catalogue import print_catalogue

    name = (args.config or "configs/cuhk.py").partition(":")[0]
    print_catalogue(name, _config(args).data.name)


@mode("config table", f"seeds workdir {PROCESSES}")
def reproduce(args: Arguments) -> None:
    """trains every row of one of the paper's tables, with several seeds

    --mode=reproduce --config=configs/ablation.py --table=2
    """
    from alignps_jax.experiments.reproduce import reproduce_table
    from alignps_jax.training.train import train_and_evaluate

    workdir = args.workdir or Path(f"runs/reproduce-{args.config_name}")
    run = partial(train_and_evaluate, typed=args.overridden)
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
    try:
        code = main(sys.argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of what ends Python
    if "jax" in sys.modules:
        from alignps_jax.distributed import leave

        leave(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code.

    0, 2 after bad input, 3 where photos were skipped, 129, 130, 143 after SIGHUP, Ctrl-C, SIGTERM.
    """
    try:
        args = parse(argv)
        _prepare(args)
        MODES[args.mode].run(args)
        from alignps_jax.distributed import barrier

        barrier("end")
    except (UserError, OSError, MemoryError, UnicodeEncodeError) as error:  # in their own words
        return _fail(str(error) or "out of memory", getattr(error, "exit_code", 2))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else _fail(leaving.code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        return _fail(
            f"found no package {error.name}; in the project's folder run make setup, or pip "
            "install . (galleries need '.[gallery]', .pth files '.[torch]')"
        )
    return 0


def _fail(reason: object, code: int = 2) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return code


def _prepare(args: Arguments) -> None:
    """Joins the other processes of the run, and looks for the devices that JAX shall use."""
    import jax

    from alignps_jax.checkpoint.places import check_lasting
    from alignps_jax.distributed import join

    if args.distributed or {args.coordinator, args.processes, args.process} != {None}:
        join(args.coordinator, args.processes, args.process)
    platforms = os.environ.get("JAX_PLATFORMS")
    try:
        _ = platforms and jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set JAX")[0] or "it finds no such device"
        raise UserError(f"JAX_PLATFORMS={platforms}: JAX cannot use it here ({reason})") from error
    written = ["target", "detections", "workdir"]
    if args.mode == "evaluate" and not (args.checkpoint or args.detections):
        written.remove("workdir")  # the run itself
    for flag in written:
        if getattr(args, flag):
            check_lasting(f"--{flag}", getattr(args, flag))
