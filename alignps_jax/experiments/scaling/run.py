"""`--mode=scaling`: with topologies the gate that compiles, without them the measurement."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from alignps_jax.experiments.scaling.cases import cases, parse_scale
from alignps_jax.experiments.scaling.chips import parse_topologies
from alignps_jax.experiments.scaling.gate import run_gate
from alignps_jax.experiments.scaling.measure import measure_scaling
from alignps_jax.nn.model import build_model
from alignps_jax.types import UserError


def run_scaling(
    config: ConfigDict,
    topology: str | None,
    *,
    what: str | None,
    scale: str | None,
    batch: int | None,
    runs: int,
    target: Path,
) -> None:
    """Compiles steps for the chips of `topology`, or measures them on the devices that are here.

    Args:
      config: what to build; `train.batch_size` images are on each device if `batch` is None.
      topology: `<chip>:<shape>`, several separated by commas; None measures.
      what: inference, train or epoch, several separated by commas; None: inference and train.
      scale: `<long>x<short>` in pixels; None: the test scale, and the largest training scale.
      batch: images of each device.
      runs: timed runs of each measurement.
      target: the JSON file; tables and plots go beside it.

    Raises:
      UserError: an argument is wrong, or a compiler is not installed.
    """
    batch = config.train.batch_size if batch is None else batch
    for name, value in (("batch", batch), ("runs", runs)):
        if value < 1:
            raise UserError(f"--{name}: found {value}, expected 1 or more")
    if target.suffix != ".json":
        raise UserError(f"--target: found {str(target)!r}, expected a file that ends in .json")
    build_model(config)  # raises if a field of it is wrong
    steps = cases(config, what or "inference,train", parse_scale(scale), batch)
    if topology is None:
        measure_scaling(config, steps, target, runs=runs, devices=jax.devices())
    else:
        run_gate(config, parse_topologies(topology), steps, target)
