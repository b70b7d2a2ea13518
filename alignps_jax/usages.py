"""What each mode does, reads and needs: the table behind `--help` and behind its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_CONFIG = "configuration file and variant, such as configs/cuhk.py:plus"
_OTHER_CONFIG = f"{_CONFIG}; default: the configuration of the checkpoint"
_CHECKPOINT = "workdir of a run (its best step), or the folder of one step"
_BOX = "x1,y1,x2,y2 of the person in the query photo, in its pixels; default: everybody"
_LASTING = "gallery that --mode=index made (a folder, or another address that LanceDB takes)"
_EXACT = "up to so many people are searched exactly, in memory; default: 2000000"
_EVERY = "of a video, one frame per so much time is looked at: 1s, 500ms, 2min; default: 1s"
_PROCESSES = {
    "distributed": "runs of several processes that SLURM, Open MPI, Kubernetes or a TPU pod starts",
    "coordinator": "elsewhere: host:port of process 0",
    "processes": "elsewhere: how many processes there are",
    "process": "elsewhere: which one this is, from 0",
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """A mode as its user sees it.

    Attributes:
      summary: what it does, in a line.
      flags: the flags that it reads, and what each means.
      examples: command lines, without the program.
      needs: of each of these groups it needs one flag.
      one_of: of each of these groups it takes no more than one flag.
    """

    summary: str
    flags: Mapping[str, str]
    examples: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()


USAGES: dict[str, Usage] = {
    "train": Usage(
        "trains, resumes what --workdir holds, and evaluates the result",
        {
            "config": f"{_CONFIG}; default: that of the run in --workdir, else of --checkpoint",
            "workdir": "where the run lies or goes; default: runs/<name of the configuration>",
            "checkpoint": "fine-tune this detector (workdir or folder of a step) on other data",
            "accept_changes": "resume although fields changed that decide what training does",
            **_PROCESSES,
        },
        (
            "--config=configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk",
            "--workdir=runs/cuhk                         # resumes that run",
            "--checkpoint=runs/cuhk --config=configs/prw.py --config.data.root=/data/PRW",
            "--workdir=runs/cuhk --config.optimizer.learning_rate=0.0005 --accept_changes",
        ),
        needs=(("config", "workdir"),),
    ),
    "evaluate": Usage(
        "measures detection and search of a checkpoint, or of saved detections",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": f"{_CHECKPOINT}; default: --workdir",
            "workdir": "where results go; default: that of the run; of one step: <run>/step_<step>",
            "detections": "saved detections (.npz) to measure instead of a checkpoint",
            **_PROCESSES,
        },
        (
            "--mode=evaluate --workdir=runs/cuhk",
            "--mode=evaluate --workdir=runs/cuhk --config.data.root=/elsewhere "
            "--config.eval.score_threshold=0.3",
            "--mode=evaluate --detections=runs/cuhk/detections.npz "
            "--config.eval.context_matching='(10,3)'",
        ),
        needs=(("checkpoint", "workdir", "detections"),),
        one_of=(("checkpoint", "detections"),),
    ),
    "search": Usage(
        "searches a person in a gallery, or in a folder of photos",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": _CHECKPOINT,
            "query": "photo with the person to find",
            "box": _BOX,
            "gallery": f"{_LASTING}, or folder of photos",
            "exact_up_to": _EXACT,
            "workdir": "where results go; default: <run>/search/<name of the query>",
            **_PROCESSES,
        },
        (
            "--mode=search --checkpoint=runs/cuhk --query=photo.jpg --box=310,120,390,330 "
            "--gallery=photos/",
            "--mode=search --checkpoint=runs/cuhk --query=photo.jpg --gallery=people.lance",
        ),
        needs=(("checkpoint",), ("query",), ("gallery",)),
    ),
    "index": Usage(
        "finds everybody in photos and videos, once, and adds them to a gallery",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": _CHECKPOINT,
            "gallery": "where it lies or goes: a folder such as people.lance, or another address "
            "that LanceDB takes",
            "source": "folder of photos and videos, with all below it, or one of them",
            "every": _EVERY,
            "prune": "remove people whose photo or video is not below --source any more",
            "exact_up_to": "beyond so many people, make an index for the search; default: 2000000",
        },
        (
            "--mode=index --checkpoint=runs/cuhk --gallery=people.lance --source=/photos",
            "--mode=index --checkpoint=runs/cuhk --gallery=people.lance --source=/videos "
            "--every=500ms --prune",
        ),
        needs=(("checkpoint",), ("gallery",), ("source",)),
    ),
    "forget": Usage(
        "removes people from a gallery for good, and keeps them out of the next indexing",
        {
            "gallery": _LASTING,
            "photo": "photo or video whose people are forgotten",
            "person": "who is forgotten: the id of one result, as ranking.json has it",
        },
        (
            "--mode=forget --gallery=people.lance --photo=/photos/party.jpg",
            "--mode=forget --gallery=people.lance --person=1f3a5c7e9b2d4f6a8c0e1b3d-0",
        ),
        needs=(("gallery",), ("photo", "person")),
        one_of=(("photo", "person"),),
    ),
    "detect": Usage(
        "finds everybody in photos and videos, and writes boxes, scores and embeddings",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": _CHECKPOINT,
            "source": "folder of photos and videos, with all below it, or one of them",
            "every": _EVERY,
            "target": "file to write: .json (results of COCO), .csv (a table), or .npz (with "
            "embeddings)",
        },
        ("--mode=detect --checkpoint=runs/cuhk --source=/photos --target=people.json",),
        needs=(("checkpoint",), ("source",), ("target",)),
    ),
    "serve": Usage(
        "serves a page in the browser that searches a gallery",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": f"{_CHECKPOINT}; the one that made the gallery",
            "gallery": _LASTING,
            "exact_up_to": _EXACT,
            "host": "address to listen on; default: 127.0.0.1, this machine alone; any other one "
            "prints an address with a token that visitors need",
            "port": "port to listen on, 0 for a free one; default: 8000",
        },
        (
            "--mode=serve --gallery=people.lance --checkpoint=runs/cuhk",
            "--mode=serve --gallery=people.lance --checkpoint=runs/cuhk --host=0.0.0.0 --port=80",
        ),
        needs=(("checkpoint",), ("gallery",)),
    ),
    "convert": Usage(
        "makes a checkpoint of published PyTorch weights",
        {
            "config": _CONFIG,
            "source": "file of the weights (.pth, .safetensors, .pkl)",
            "convention": "pixels that a ResNet-50 expects: torchvision or caffe",
            "workdir": "where the checkpoint goes; holds none yet",
        },
        (
            "--mode=convert --config=configs/cuhk.py:released --source=cuhk_alignps.pth "
            "--workdir=runs/cuhk_released",
        ),
        needs=(("config",), ("source",), ("workdir",)),
    ),
    "export": Usage(
        "writes a checkpoint for PyTorch or as a program without ours, or a gallery as one table",
        {
            "config": _OTHER_CONFIG,
            "checkpoint": _CHECKPOINT,
            "gallery": _LASTING,
            "target": "file to write: .pth or .safetensors as the released PyTorch code names the "
            "weights; .stablehlo (jax.export); of a gallery .parquet or .arrow",
        },
        (
            "--mode=export --checkpoint=runs/cuhk --target=cuhk.safetensors",
            "--mode=export --checkpoint=runs/cuhk --target=detector.stablehlo "
            "--config.eval.batch_size=1",
            "--mode=export --gallery=people.lance --target=people.parquet",
        ),
        needs=(("checkpoint", "gallery"), ("target",)),
        one_of=(("checkpoint", "gallery"), ("config", "gallery")),
    ),
    "visualize": Usage(
        "draws figures: sampling points, rankings, similarity, detections, curves",
        {
            "config": f"{_OTHER_CONFIG}s",
            "what": "kind of figure, such as sampling_points; a wrong one lists them",
            "checkpoint": f"{_CHECKPOINT}; several: A,B,...",
            "detections": "saved detections (.npz) instead of a checkpoint; several: A,B,...",
            "query": "photo to draw, or with the person to find",
            "box": _BOX,
            "gallery": "folder of photos",
            "workdir": "where pictures go; default: <run>/figures",
        },
        (
            "--mode=visualize --what=sampling_points --checkpoint=runs/cuhk --query=photo.jpg",
            "--mode=visualize --what=comparison --checkpoint=runs/cuhk,runs/baseline",
        ),
        needs=(("checkpoint", "detections"),),
        one_of=(("checkpoint", "detections"),),
    ),
    "benchmark": Usage(
        "measures speed and memory on this machine",
        {
            "config": f"{_CONFIG}; default: configs/cuhk.py",
            "what": "parts to measure, a,b,...; default: all",
            "runs": "timed runs of each row; default: 5",
            "quick": "tiny shapes, only to see that it runs",
            "workdir": "where the table goes; default: runs/benchmark",
        },
        ("--mode=benchmark --what=inference,train",),
    ),
    "scaling": Usage(
        "compiles for chips that are not here, or measures 1, 2, 4, ... of the devices that are",
        {
            "config": f"{_CONFIG}; default: configs/cuhk.py",
            "topology": "chips to compile for, a,b,...: v5e:2x4, v6e:2x2, v5p:2x2x1, h100:8, "
            "a100:1, v100:1, cpu:8; without it, measures",
            "what": "inference, train, epoch (training on every bucket: slow for a TPU), "
            "a,b,...; default: inference,train",
            "scale": "<long>x<short> in pixels; default: the test and the largest training scale",
            "batch": "images of each device; default: config.train.batch_size",
            "runs": "measuring: timed runs of each row; default: 5",
            "target": "JSON file; tables and plots go beside it; default: runs/scaling/gate.json, "
            "or measured.json",
        },
        (
            "--mode=scaling --config=configs/cuhk.py --topology=v5e:2x4,h100:8,v100:1 --batch=1",
            "--mode=scaling --what=epoch --topology=h100:8 --config.model.dtype=bfloat16",
            "--mode=scaling --what=train --batch=4 --scale=1000x600",
        ),
    ),
    "list": Usage(
        "lists the variants of a configuration: what each changes, the paper's numbers",
        {"config": "configuration file; default: configs/cuhk.py"},
        ("--mode=list", "--mode=list --config=configs/prw.py"),
    ),
    "reproduce": Usage(
        "trains every row of one of the paper's tables, with several seeds",
        {
            "config": _CONFIG,
            "table": "table of the paper, 1 to 6 or fig4",
            "seeds": "runs of each row; default: 2",
            "workdir": "where the runs go; default: runs/reproduce-<name of the configuration>",
            **_PROCESSES,
        },
        ("--mode=reproduce --config=configs/ablation.py --table=2",),
        needs=(("config",), ("table",)),
    ),
}


def modes_help() -> str:
    """The modes, one line each."""
    width = max(map(len, USAGES))
    return "\n".join(
        [
            "Person search with AlignPS. One mode at a time (default: train):",
            "",
            *(f"  --mode={mode:{width}}  {usage.summary}" for mode, usage in USAGES.items()),
            "",
            "python launch.py --mode=MODE --help lists the flags of a mode, with examples.",
        ]
    )


def mode_help(mode: str) -> str:
    """The flags of a mode, with examples."""
    usage = USAGES[mode]
    names = {name: f"--{name}" for name in usage.flags} | {"field": "--config.SECTION.FIELD"}
    width = max(map(len, names.values()))
    needed = {name for group in usage.needs if len(group) == 1 for name in group}
    lines = [
        f"  {names[name]:{width}}  {text}{' (needed)' if name in needed else ''}"
        for name, text in usage.flags.items()
    ]
    field = "value of a field of the configuration; configs/cuhk.py documents all of them"
    groups = [group for group in usage.needs if len(group) > 1]
    return "\n".join(
        [
            f"--mode={mode} {usage.summary}.",
            "",
            *lines,
            f"  {names['field']:{width}}  {field}",
            *(f"One of {', '.join(f'--{name}' for name in group)} is needed." for group in groups),
            "",
            "Examples:",
            *(f"  python launch.py {example}" for example in usage.examples),
        ]
    )
