"""`make benchmark`: the network beside PyTorch's, a gallery that grows, and how fast modes start.

python -m tests.benchmark --what=deform_conv,inference --runs=3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from alignps_jax.errors import known_name
from alignps_jax.experiments.benchmark import Row, Table
from alignps_jax.types import UserError
from tests.benchmark import deform_conv, gallery, network, starts
from tests.benchmark.measure import Context, find_torch

PARTS: dict[str, Callable[[Context], Iterable[Row]]] = {
    "deform_conv": deform_conv.rows,
    "inference": network.inference_rows,
    "train": network.train_rows,
    "gallery": gallery.rows,
    "starts": starts.rows,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the parts of `--what`; returns the exit code: 0, or 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--what", help="parts, a,b,...; default: all", default=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=5, help="timed runs of every figure")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"), help="for results")
    parser.add_argument("--people", help="sizes of the gallery", default="10000,100000,1000000")
    flags = parser.parse_args(argv)
    people = tuple(map(int, flags.people.split(",")))
    context = Context(flags.runs, flags.quick, find_torch(), people)
    try:
        names = [known_name("--what", name, PARTS) for name in flags.what.split(",")]
        for name in names:
            table = Table(flags.workdir / f"{name}.json")
            for row in PARTS[name](context):
                table.add(row)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
