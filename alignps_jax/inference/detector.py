"""Person search in one's own photos."""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import load_config, load_weights
from alignps_jax.inference.location_maps import LocationMaps, compute_maps, maps_of_photo
from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.types import Detections, Weights
from data_pipeline.pipeline import single_image_batch


def inference_model(config: ConfigDict) -> AlignPS:
    """The network that training builds, but without a backward pass to recompute anything in."""
    inference = config.copy_and_resolve_references()
    inference.model.remat = False
    return build_model(inference)


class Detector:
    """Finds the people of a photo and gives each an embedding.

    Attributes:
      config: the configuration of the checkpoint.
      step: the training step of its weights.
      name: where its weights come from, for people to read.
    """

    def __init__(self, config: ConfigDict, model: AlignPS, weights: Weights, source: str = ""):
        self.config = config
        self.step = int(weights.step)
        self.name = f"{source or 'weights in memory'}, step {self.step}"
        self._weights = weights
        self._predict = jax.jit(PredictStep(model, config.eval))
        self._compute_maps = jax.jit(partial(compute_maps, model, config.eval.precision))

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: ConfigDict | None = None) -> Self:
        """Loads the best checkpoint of a workdir, or one step's folder.

        Args:
          path: the workdir or folder.
          config: what to use instead of the checkpoint's own configuration.

        Raises:
          UserError: there is none, it is damaged, or it does not fit `config`.
        """
        config = config or load_config(Path(path))
        model = inference_model(config)
        return cls(config, model, load_weights(Path(path), weights_template(model)), str(path))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all weights, in hexadecimal digits: equal for equal weights only."""
        digest = hashlib.sha256()
        weights = {"params": self._weights.params, "frozen": self._weights.frozen}
        for path, array in jax.tree_util.tree_leaves_with_path(weights):
            values = np.asarray(array)
            digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> Detections:
        """All detections of an RGB photo by the released code's inference rule, best first.

        Callers filter by score. The photo is resized to the test scale of the configuration.

        Returns:
          Detections [K], all valid: boxes x1, y1, x2, y2 in the photo's own pixels, scores in
          [0, 1], embeddings of length one.

        Raises:
          UserError: the image is not an RGB uint8 array.
        """
        batch = single_image_batch(image, self.config.data)
        found = jax.device_get(self._predict(self._weights.params, self._weights.frozen, batch))
        valid = found.valid[0]
        return jax.tree.map(lambda x: x[0][valid], found)

    def maps(self, image: UInt8[np.ndarray, "H W 3"]) -> LocationMaps:
        """What the network computes at every location of an RGB photo; raises as `detect`."""
        batch = single_image_batch(image, self.config.data)
        found = self._compute_maps(self._weights.params, self._weights.frozen, batch)
        return maps_of_photo(found, batch)
