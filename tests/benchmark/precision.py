"""How far rounded products move results: TF32 and bfloat16, simulated on a CPU.

python -m tests.benchmark.precision --checkpoint=runs/demo

`config.model.precision` and `config.eval.precision` choose between float32 products and what a chip
does by default. That is simulated here: the operands of every product and convolution are rounded
as the chip rounds them, and sums stay float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from ml_collections import ConfigDict

from alignps_jax.boxes import iou
from alignps_jax.checkpoint.store import load_config, load_weights
from alignps_jax.devices import parallel_predict_step
from alignps_jax.evaluation.evaluate import Evaluator, make_evaluator
from alignps_jax.evaluation.results import Measured
from alignps_jax.evaluation.scoring import make_scorer
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.nn.model import weights_template
from alignps_jax.types import GalleryDetections, UserError
from data_pipeline.datasets import prepare

# Bits after the point of the operands: of TensorFloat-32, and of one bfloat16 pass.
ROUNDINGS = {"TF32 (GPUs since Ampere)": 10, "bfloat16 (TPUs)": 7}
_PRODUCTS = ("dot_general", "conv_general_dilated")


def rounded(function: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """`function`, with operands of so many `bits` in all products that may be rounded."""

    def call(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _run(closed, jax.tree.leaves(args), bits)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def _run(closed: core.ClosedJaxpr, args: Sequence[Any], bits: int) -> list[Any]:
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        results = _equation(equation, [read(atom) for atom in equation.invars], bits)
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in closed.jaxpr.outvars]


def _equation(equation: core.JaxprEqn, operands: list[Any], bits: int) -> Sequence[Any]:
    name, params = equation.primitive.name, dict(equation.params)
    if "call_jaxpr" in params:  # functions with a gradient of their own
        return _run(params["call_jaxpr"], operands, bits)
    if name in _PRODUCTS and lax.Precision.HIGHEST not in (params["precision"] or ()):
        operands = [lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits) for x in operands]
    for key, value in params.items():
        if isinstance(value, core.ClosedJaxpr):  # loops
            params[key] = _rounded_body(value, bits)
        elif isinstance(value, tuple) and any(isinstance(x, core.ClosedJaxpr) for x in value):
            params[key] = tuple(_rounded_body(branch, bits) for branch in value)
    params = equation.primitive.get_bind_params(params)
    results = equation.primitive.bind(*operands, **params)
    return results if equation.primitive.multiple_results else [results]


def _rounded_body(body: core.ClosedJaxpr, bits: int) -> core.ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: _run(body, args, bits))(*body.in_avals)


@dataclasses.dataclass(frozen=True)
class Moves:
    """How far rounding moved the people found with a score that counts; each with its nearest."""

    lost: int
    of: int
    score: float
    box: float
    cosine: float


def moves(exact: GalleryDetections, other: GalleryDetections, threshold: float) -> Moves:
    """The largest differences in score, box (pixels) and embedding (smallest cosine).

    A person whose best overlap in `other` has an IoU below 0.5 is lost, and not compared.
    """
    score = box = 0.0
    cosine, lost, count = 1.0, 0, 0
    for image in range(len(exact.names)):
        mine, theirs = exact.of(image), other.of(image)
        counts = np.flatnonzero(exact.scores[mine] >= threshold) + mine.start
        overlap = np.asarray(iou(exact.boxes[counts][:, None], other.boxes[theirs][None]))
        for row, overlaps in zip(counts, overlap, strict=True):
            count += 1
            if not overlaps.size or overlaps.max() < 0.5:
                lost += 1
                continue
            near = theirs.start + int(overlaps.argmax())
            score = max(score, abs(float(exact.scores[row] - other.scores[near])))
            box = max(box, float(np.abs(exact.boxes[row] - other.boxes[near]).max()))
            cosine = min(cosine, float(exact.embeddings[row] @ other.embeddings[near]))
    return Moves(lost, count, score, box, cosine)


def measure(config: ConfigDict, checkpoint: Path) -> dict[str, tuple[Measured, Moves]]:
    """The test split with exact products and with each of `ROUNDINGS`."""
    config.eval.precision = "default"  # products then say that they may be rounded
    step = make_predict_step(config)
    weights = load_weights(checkpoint, weights_template(step.model))
    evaluator = make_evaluator(config, prepare(config.data).test, make_scorer(config))

    def run(evaluator: Evaluator) -> Measured:
        return evaluator.measure(weights.params, weights.frozen, int(weights.step))

    exact = run(evaluator)
    threshold = config.eval.score_threshold
    found = {"float32": (exact, moves(exact.detections, exact.detections, threshold))}
    for name, bits in ROUNDINGS.items():
        predict = parallel_predict_step(rounded(step, bits))
        other = run(dataclasses.replace(evaluator, predict=predict))
        found[name] = (other, moves(exact.detections, other.detections, threshold))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code: 0, or 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.precision")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    checkpoint = parser.parse_args(argv).checkpoint
    try:
        found = measure(load_config(checkpoint), checkpoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("products                   mAP   AP   lost    score  box (px)  1 - cosine")
    for name, (measured, moved) in found.items():
        search = next(iter(measured.searches.values()))
        print(
            f"{name:25}{100 * search.mAP:6.2f}{100 * measured.detection.AP:6.2f}"
            f"{moved.lost:4}/{moved.of}{moved.score:9.1e}{moved.box:10.1e}{1 - moved.cosine:12.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
