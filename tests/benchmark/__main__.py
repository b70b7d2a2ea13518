"""`make benchmark`: against PyTorch and against what the machine can do, and how costs grow.

python -m tests.benchmark --what=search,growth --runs=3
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import jax

from alignps_jax.experiments.benchmark.report import Report
from alignps_jax.experiments.benchmark.run import run_parts
from alignps_jax.types import UserError
from configs import cuhk
from tests.benchmark import (
    data,
    deform_conv,
    evaluate,
    growth,
    inference,
    search,
    starts,
    toim,
    train,
)
from tests.benchmark.measure import COLUMNS, Context, FloatRate, Row

# In the order in which they run and are reported.
PARTS: dict[str, Callable[[Context], Iterable[Row]]] = {
    "deform_conv": deform_conv.rows,
    "inference": inference.rows,
    "train": train.rows,
    "toim": toim.rows,
    "data": data.rows,
    "evaluate": evaluate.rows,
    "search": search.rows,
    "starts": starts.rows,
    "growth": growth.rows,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the parts of `--what`; returns the exit code: 0, or 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--what", help=f"parts, a,b,...; default: all of {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of every figure")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"), help="for results")
    parser.add_argument(
        "--against", type=Path, help="another checkout, whose starts are measured in turns"
    )
    flags = parser.parse_args(argv)
    rate = FloatRate(runs=flags.runs, quick=flags.quick)
    context = Context(
        cuhk.get_config(),
        flags.runs,
        flags.quick,
        flags.workdir,
        find_torch(),
        rate,
        against=flags.against,
    )
    try:
        report = Report(flags.workdir / "benchmark.json", COLUMNS, Row)
        run_parts(PARTS, flags.what, context, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_torch() -> ModuleType | None:
    """PyTorch, if it and torchvision are installed and it runs on our kind of device."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision")
    except ImportError:
        return None
    same = jax.default_backend() == "cpu" or (
        jax.default_backend() == "gpu" and torch.cuda.is_available()
    )
    return torch if same else None


if __name__ == "__main__":
    sys.exit(main())
