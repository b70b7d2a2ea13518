"""One step of inference on one device: the people of a batch of photos."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from alignps_jax.arrays import l2_normalize
from alignps_jax.inference.postprocess import detect, embed_boxes
from alignps_jax.nn.model import AlignPS, build_model
from alignps_jax.types import Batch, Detections, Outputs


def inference_model(config: ConfigDict) -> AlignPS:
    """The network of evaluation and search: it computes in `config.eval.dtype`."""
    inference = config.copy_and_resolve_references()
    inference.model.dtype = config.eval.dtype
    inference.model.remat = False  # there is no backward pass
    return build_model(inference)


@dataclasses.dataclass(frozen=True, eq=False)  # pmap needs a hash: that of the identity
class PredictStep:
    """The detections of a batch; `config` is `config.eval`.

    With `level_borders`, `config.loss.level_borders`, the people of the ground truth are taken, as
    a perfect detector would find them: an upper bound.
    """

    model: AlignPS
    config: ConfigDict
    level_borders: tuple[float, ...] | None = None

    def __call__(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        """Boxes in the photos' own pixels, best first."""
        model: Any = self.model.bind({"params": params, "frozen": frozen})
        with jax.default_matmul_precision(self.config.precision):
            outputs, c4 = model.with_c4(batch.image, batch.size)
            found = self._dense(outputs, batch)
            if c4 is None or self.config.branch == "dense":
                return found
            # To the input's pixels again, with the rounding of both ways (Released code).
            boxes = found.boxes * jnp.tile(batch.scale, 2)[:, None]
            regions = model.roi(*c4, boxes, found.valid).embeddings
            # With those of both, one after another, similarity is the mean of both branches'.
            parts = [regions] if self.config.branch == "roi" else [found.embeddings, regions]
            embeddings = l2_normalize(jnp.concatenate(parts, axis=-1)) * found.valid[..., None]
            return dataclasses.replace(found, embeddings=embeddings)

    def _dense(self, outputs: tuple[Outputs, ...], batch: Batch) -> Detections:
        """The people with the embeddings of their locations."""
        strides = self.model.strides(train=False)
        if self.level_borders is not None:
            people = batch.boxes, batch.valid, batch.scale
            return embed_boxes(outputs, *people, strides=strides, borders=self.level_borders)
        return detect(
            outputs,
            batch.size,
            batch.scale,
            strides=strides,
            pre_nms=self.config.pre_nms,
            min_cls_score=self.config.min_cls_score,
            nms_iou=self.config.nms_iou,
            max_detections=self.config.max_detections,
        )


def make_predict_step(config: ConfigDict) -> PredictStep:
    """The step that finds the people to be searched, as `config.eval.boxes` says."""
    choices = {"detected": None, "ground_truth": tuple(config.loss.level_borders)}
    return PredictStep(inference_model(config), config.eval, choices[config.eval.boxes])
