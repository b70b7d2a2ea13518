"""`--mode=benchmark`: speed, memory and compile time of inference and training on this machine.

Nothing is read: weights, photos and people are made up.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alignps_jax import devices as device
from alignps_jax.devices import Devices
from alignps_jax.errors import known_name
from alignps_jax.files import check_outputs, read_json, write_atomically, write_json
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.nn.model import AlignPS, Params, build_model, init_variables
from alignps_jax.training.setup import create_state, make_step, positives_per_image
from alignps_jax.types import Batch
from data_pipeline.transforms import Size, buckets, empty_batch

IDENTITIES = 5532  # of CUHK-SYSU, where the configuration leaves the number to the data set
PEOPLE = 8  # of an image, the least that a batch has room for

Row = dict[str, Any]  # title of a column -> text or number; "what" tells rows apart


class Table:
    """Rows in a JSON file and a Markdown table beside it, in which those of earlier runs stay."""

    def __init__(self, path: Path):
        check_outputs(path, path.with_suffix(".md"))
        self._path = path
        self.rows: list[Row] = read_json(path, "rows of this mode")["rows"] if path.exists() else []

    def add(self, row: Row) -> None:
        """Prints a row, writes it to both files, and drops the one that it measures anew."""
        print("; ".join(f"{title} {_text(x)}" for title, x in row.items()), flush=True)
        self.rows = [*(old for old in self.rows if old["what"] != row["what"]), row]
        write_json(self._path, {"rows": self.rows})
        titles = list(dict.fromkeys(title for each in self.rows for title in each))
        cells = [[_text(each.get(title, "")) for title in titles] for each in self.rows]
        lines = [f"| {' | '.join(line)} |\n" for line in (titles, ["---"] * len(titles), *cells)]
        write_atomically(self._path.with_suffix(".md"), "".join(lines).encode())


def _text(value: object) -> str:
    """A number with three digits, or with all before the point."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
    return str(value).replace("|", "\\|")


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], runs: int
) -> dict[str, list[float]]:
    """Seconds of the runs of functions, ascending; they take turns, a first one does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + runs):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(each[1:]) for name, each in seconds.items()}


def peak_memory(program: jax.stages.Compiled) -> float:
    """GB of a device that a program needs at most, its code left out."""
    found: Any = program.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (getattr(found, "peak_memory_in_bytes", 0) or sizes - found.alias_size_in_bytes) / 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A step on `batch` images of (height, width) on each device; `kind` is how it computes."""

    step: str
    size: Size
    batch: int
    kind: str

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.step} {width}×{height}, batch {self.batch}, {self.kind}"


def cases(config: ConfigDict, what: str | None, batch: int) -> list[Case]:
    """The steps named in `what`, separated by commas (None: both), at their largest scale."""
    largest = max(config.data.train_scales, key=np.prod)
    scales = {"inference": config.data.test_scale, "train": largest}
    kinds = {"inference": config.eval, "train": config.model}
    kinds = {step: f"{each.dtype} {each.precision}" for step, each in kinds.items()}
    kinds["train"] += " remat" if config.model.remat else ""
    names = [known_name("--what", name, kinds) for name in (what or ",".join(kinds)).split(",")]
    return [Case(name, buckets([scales[name]])[0], batch, kinds[name]) for name in names]


@dataclasses.dataclass(frozen=True)
class Program:
    """A step compiled for devices, and what it takes."""

    compiled: jax.stages.Compiled
    seconds: float  # of compiling
    initial: Callable[[], tuple[Any, ...]]  # the first arguments; a training step's are its state
    batch: Batch  # of one device

    def runner(self, devices: Devices) -> Callable[[], object]:
        """A function that runs the step, each time on what the last run left."""
        # Donation takes the buffers, so no two leaves may share one.
        arguments = device.replicate(jax.tree.map(jnp.copy, self.initial()), devices)
        batch = jax.tree.map(lambda x: np.stack([x] * len(devices)), self.batch)

        def run() -> object:
            nonlocal arguments
            result = self.compiled(*arguments, batch)
            arguments = result[:1] if len(arguments) == 1 else arguments
            return result

        return run


def make_program(config: ConfigDict, case: Case, devices: Devices) -> Program:
    """A step as the product runs it, with made-up weights and images."""
    function: Any
    if case.step == "inference":
        predict = make_predict_step(config)
        model, function = predict.model, device.parallel_predict_step(predict, devices)
    else:
        model = build_model(config)
        positives = positives_per_image(config, PEOPLE) * case.batch
        _, step = make_step(config, model, steps_per_epoch=1000, positives=positives)
        function = device.parallel_train_step(step, devices)

    def initial() -> tuple[Any, ...]:
        params, frozen = plausible_weights(model)
        if case.step == "inference":
            return params, frozen
        state = create_state(config, model, step.optimizer, config.loss.lut_size or IDENTITIES)
        return (dataclasses.replace(state, params=params, frozen=frozen),)

    start, batch = time.perf_counter(), made_up_batch(case.size, case.batch)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), batch)
    program = function.lower(*jax.eval_shape(initial), shapes).compile()
    return Program(program, time.perf_counter() - start, initial, batch)


def plausible_weights(model: AlignPS) -> tuple[Params, Params]:
    """(params, frozen) of a network that was not trained, but behaves as if it were.

    The activations of a ResNet-50 keep a sane size, and offsets are of one or two pixels: the
    memory that a deformable convolution reads depends on them.
    """

    def plausible(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "0/backbone/conv1/kernel":
            return leaf / 16
        return leaf / 4 if name.endswith("bn3/scale") else leaf

    return jax.tree.map_with_path(plausible, init_variables(model, jax.random.key(0)))


def made_up_batch(size: Size, images: int) -> Batch:
    """Noise that fills the bucket, and people of a tenth or a fifth of its height somewhere."""
    rng, (height, width), shape = np.random.default_rng(0), size, (images, PEOPLE)
    corner = rng.uniform(0, 0.8, (*shape, 2)) * (width, height)
    extent = rng.uniform(0.1, 0.2, (*shape, 2)) * height
    return dataclasses.replace(
        empty_batch(images, size, PEOPLE),
        image=rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8),
        size=np.full((images, 2), size, np.int32),
        valid_image=np.ones(images, bool),
        boxes=np.concatenate([corner, corner + extent], axis=2).astype(np.float32),
        identity=rng.integers(0, 8, shape).astype(np.int32),
        labeled=rng.random(shape) < 0.5,
        valid=np.ones(shape, bool),
    )


def run_case(config: ConfigDict, case: Case, devices: Devices, runs: int) -> Row:
    """The columns of a step on these devices, each with `case.batch` images."""
    program = make_program(config, case, devices)
    seconds = time_in_turns({"": program.runner(devices)}, runs)[""]
    median = statistics.median(seconds)
    return {
        "photos/s": case.batch * len(devices) / median,
        "seconds": median,
        "from": seconds[0],
        "to": seconds[-1],
        "memory, GB": peak_memory(program.compiled),
        "compile, s": program.seconds,
        "machine": f"{device.device_names()}, {os.cpu_count()} cores, jax {jax.__version__}",
    }


def run_benchmark(config: ConfigDict, what: str | None, workdir: Path, runs: int) -> None:
    """Measures the steps named in `what` on all devices, in the batches of the configuration.

    Writes `<workdir>/benchmark.json` and `benchmark.md` after every row.

    Raises:
      UserError: there is no such step, or `workdir` is a file.
    """
    table, devices = Table(workdir / "benchmark.json"), jax.devices()
    for case in cases(config, what, 0):
        section = config.eval if case.step == "inference" else config.train
        for batch in sorted({1, -(-section.batch_size // len(devices))}):
            this = dataclasses.replace(case, batch=batch)
            table.add({"what": str(this), **run_case(config, this, devices, runs)})
