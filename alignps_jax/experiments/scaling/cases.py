"""The steps that are compiled or measured: a network, its state and a batch, as shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.devices import Devices, parallel_predict_step, parallel_train_step
from alignps_jax.experiments.benchmark.parts import IDENTITIES
from alignps_jax.experiments.benchmark.simulate import as_if_trained, plausible_weights
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.nn.model import build_model
from alignps_jax.training.setup import make_step
from alignps_jax.training.state import create_state, positives_per_image
from alignps_jax.types import Batch, TrainState, UserError
from data_pipeline.transforms import Scale, Size, buckets, empty_batch

PEOPLE = 8  # room of an image, the least that a data set has


@dataclasses.dataclass(frozen=True)
class Case:
    """A step on some images: `step` is inference or train, `batch` the images of each device."""

    step: str
    size: Size
    batch: int

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.step} {width}×{height}, batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A step over devices.

    Attributes:
      function: takes what `initial` makes and a batch with a leading axis of devices.
      batch: the shapes of the batch.
      initial: makes the first arguments; nothing is computed before it is called.
      following: the first arguments of the next run, given those of a run and its result.
    """

    function: Any
    batch: Batch
    initial: Callable[[], tuple[Any, ...]]
    following: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of all arguments."""
        return (*jax.eval_shape(self.initial), self.batch)


def cases(config: ConfigDict, what: str, scale: Scale | None, batch: int) -> list[Case]:
    """The steps that `what` names, separated by commas.

    Without a scale, inference takes the one of the tests, a training step the largest one. `epoch`
    is a training step for every bucket.

    Raises:
      UserError: there is no such step.
    """
    largest = max(config.data.train_scales, key=np.prod)
    known: dict[str, tuple[str, tuple[Size, ...]]] = {
        "inference": ("inference", buckets([scale or config.data.test_scale])[:1]),
        "train": ("train", buckets([scale or largest])[:1]),
        "epoch": ("train", buckets([scale] if scale else config.data.train_scales)),
    }
    found: dict[Case, None] = {}
    for name in (name.strip() for name in what.split(",")):
        if name not in known:
            raise UserError(f"--what: found {name!r}, expected some of {', '.join(known)}")
        step, sizes = known[name]
        found |= {Case(step, size, batch): None for size in sizes}
    return list(found)


def parse_scale(text: str | None) -> Scale | None:
    """`--scale=<long>x<short>` in pixels; raises UserError for anything else."""
    if text is None:
        return None
    sides = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    long, short = map(int, sides.groups()) if sides else (0, 0)
    if not 2**15 >= long >= short >= 1:
        raise UserError(f"--scale: found {text!r}, expected <long>x<short> such as 1000x600")
    return long, short


def usable(config: ConfigDict) -> ConfigDict:
    """A copy that needs neither weights nor a data set."""
    config = ConfigDict(config.to_dict())
    config.loss.lut_size = config.loss.lut_size or IDENTITIES
    return config


def prepare(config: ConfigDict, case: Case, devices: Devices) -> Prepared:
    """The step over these devices, as the product runs it, without computing anything."""
    return STEPS[case.step](config, case, devices)


def _inference(config: ConfigDict, case: Case, devices: Devices) -> Prepared:
    step = make_predict_step(config)
    return Prepared(
        function=parallel_predict_step(step, devices),
        batch=_batch(case, len(devices)),
        initial=partial(plausible_weights, step.model),
        following=lambda weights, found: weights,
    )


def _train(config: ConfigDict, case: Case, devices: Devices) -> Prepared:
    model = build_model(config)
    positives = positives_per_image(config, PEOPLE) * case.batch
    _, step = make_step(config, model, steps_per_epoch=1000, positives=positives)

    def initial() -> tuple[TrainState]:
        state = create_state(config, model, step.optimizer, config.loss.lut_size)
        params, frozen = as_if_trained(state.params, state.frozen)
        return (dataclasses.replace(state, params=params, frozen=frozen),)

    return Prepared(
        function=parallel_train_step(step, devices),
        batch=_batch(case, len(devices)),
        initial=initial,
        following=lambda state, result: (result[0],),
    )


STEPS: dict[str, Callable[[ConfigDict, Case, Devices], Prepared]] = {
    "inference": _inference,
    "train": _train,
}


def _batch(case: Case, devices: int) -> Batch:
    one = empty_batch(1, case.size, PEOPLE)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((devices, case.batch, *x.shape[1:]), x.dtype), one
    )


# The type of each step's activations, and how it multiplies float32 numbers: highest or default.
ARITHMETIC: dict[str, Callable[[ConfigDict], tuple[str, str]]] = {
    "inference": lambda config: (config.eval.dtype, config.eval.precision),
    "train": lambda config: (config.model.dtype, config.model.precision),
}


def products_of(dtype: str, precision: str) -> str:
    """How products are computed."""
    return f"float32 {precision}" if dtype == "float32" else dtype


def how_computed(step: str, products: str, *, remat: bool) -> str:
    """What tells the programs of a step apart but its size, as the tables call it."""
    return f"{products} remat" if remat and step == "train" else products
