"""`make benchmark`: the network beside PyTorch's, a gallery that grows, and how fast modes start.

python -m tests.benchmark --what=deform_conv,inference --runs=3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from alignps_jax.errors import known_name
from alignps_jax.experiments.benchmark import Row, Table
from tests.benchmark import deform_conv, gallery, network, roi_align, starts
from tests.benchmark.measure import Context, find_torch

PARTS: dict[str, Callable[[Context], Iterable[Row]]] = {
    "deform_conv": deform_conv.rows,
    "roi_align": roi_align.rows,
    "inference": network.inference_rows,
    "train": network.train_rows,
    "gallery": gallery.rows,
    "starts": starts.rows,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the parts of `--what`."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--what", help="parts, a,b,...; default: all", default=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=5, help="timed runs of every figure")
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"), help="for results")
    parser.add_argument("--against", type=Path, help="another checkout, whose starts are measured")
    parser.add_argument("--people", default="10000,100000,1000000", help="sizes of the gallery")
    flags = parser.parse_args(argv)
    people = tuple(map(int, flags.people.split(",")))
    context = Context(flags.runs, find_torch(), flags.against, people)
    for name in [known_name("--what", name, PARTS) for name in flags.what.split(",")]:
        table = Table(flags.workdir / f"{name}.json")
        for row in PARTS[name](context):
            table.add(row)


if __name__ == "__main__":
    main()
