"""One step of inference on one device: the people of a batch of photos."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from ml_collections import ConfigDict

from alignps_jax.choices import choose, known_name
from alignps_jax.inference.postprocess import detect, embed_boxes
from alignps_jax.losses.total import level_ranges
from alignps_jax.nn.model import PRECISIONS, AlignPS, matmul_precision
from alignps_jax.types import Batch, Detections, Outputs

LARGE_PHOTO = 2**17  # pixels


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as pmap asks
class PredictStep:
    """Detections of a batch; `evaluation` is `config.eval`, `large_photo` a number of pixels."""

    model: AlignPS
    evaluation: ConfigDict
    large_photo: int = LARGE_PHOTO

    def __post_init__(self) -> None:
        known_name("config.eval.precision", self.evaluation.precision, PRECISIONS)

    def __call__(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        """Boxes in the photos' own pixels, best first.

        On CPUs large photos one after another: the maps of several would not stay in the cache.
        """
        if math.prod(batch.image.shape[1:3]) < self.large_photo:
            return self._together(params, frozen, batch)
        return lax.platform_dependent(
            params, frozen, batch, cpu=self._one_by_one, default=self._together
        )

    def _one_by_one(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        singles = jax.tree.map(lambda x: x[:, None], batch)
        found = lax.map(partial(self._together, params, frozen), singles)
        return jax.tree.map(lambda x: x[:, 0], found)

    def _together(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        with matmul_precision(self.evaluation.precision):
            outputs: Any = self.model.apply(
                {"params": params, "frozen": frozen}, batch.image, batch.size
            )
        return self.decode(outputs, batch)

    def decode(self, outputs: tuple[Outputs, ...], batch: Batch) -> Detections:
        """What comes after the network."""
        return detect(
            outputs,
            batch.size,
            batch.scale,
            strides=self.model.strides(train=False),
            pre_nms=self.evaluation.pre_nms,
            min_cls_score=self.evaluation.min_cls_score,
            nms_iou=self.evaluation.nms_iou,
            max_detections=self.evaluation.max_detections,
        )


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as pmap asks
class GroundTruthStep:
    """The people of the ground truth, as a perfect detector would find them.

    An upper bound of the search by `model`; `level_borders` is that of `config.loss`, `precision`
    that of `config.eval`.
    """

    model: AlignPS
    level_borders: tuple[float, ...]
    precision: str

    def __post_init__(self) -> None:
        known_name("config.eval.precision", self.precision, PRECISIONS)
        # Raises if they do not fit.
        level_ranges(self.model.predicted_levels(train=False), self.level_borders)

    def __call__(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        """The batch's own boxes in the photos' pixels, with score 1 and their embeddings."""
        with matmul_precision(self.precision):
            outputs: Any = self.model.apply(
                {"params": params, "frozen": frozen}, batch.image, batch.size
            )
        return embed_boxes(
            outputs,
            batch.boxes,
            batch.valid,
            batch.scale,
            strides=self.model.strides(train=False),
            borders=self.level_borders,
        )


PREDICT_STEPS: dict[str, Callable[[AlignPS, ConfigDict], Any]] = {
    "detected": lambda model, config: PredictStep(model, config.eval),
    "ground_truth": lambda model, config: GroundTruthStep(
        model, tuple(config.loss.level_borders), config.eval.precision
    ),
}


def make_predict_step(
    model: AlignPS, config: ConfigDict
) -> Callable[[Any, Any, Batch], Detections]:
    """The step that finds the people to be searched, as `config.eval.boxes` says.

    Raises:
      UserError: there is no such way.
    """
    return choose("config.eval.boxes", config.eval.boxes, PREDICT_STEPS)(model, config)
