"""Person search in one's own photos."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import load_config, load_weights
from alignps_jax.devices import parallel_predict_step, replicate, split_over_devices
from alignps_jax.files import Image, read_image
from alignps_jax.inference.location_maps import LocationMaps, compute_maps, maps_of_photo
from alignps_jax.inference.many import Read, detect_all
from alignps_jax.inference.predict import LARGE_PHOTO, PredictStep
from alignps_jax.nn.model import AlignPS, build_model, weights_template
from alignps_jax.types import Batch, Detections, UserError, Weights
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
        self._step = PredictStep(model, config.eval)
        self._predict = jax.jit(self._step)
        self._compute_maps = jax.jit(partial(compute_maps, model, config.eval.precision))

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: ConfigDict | None = None) -> Self:
        """Loads the last step of a workdir (or that which a split chose), or one step's folder.

        Args:
          path: the workdir or folder.
          config: what to use instead of the checkpoint's own configuration.

        Raises:
          UserError: there is none, it is damaged, or it does not fit `config`.
        """
        config = config or load_config(Path(path))
        model = inference_model(config)
        weights = load_weights(Path(path), weights_template(model), config=config)
        return cls(config, model, weights, str(path))

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

    def detect_many(self, photos: Iterable[str | Path | Image]) -> Iterator[Detections]:
        """What `detect` finds in each of many photos, in their order.

        They are read ahead in threads, batched, and spread over all local devices; memory does
        not grow with their number. A file is shown as a viewer shows it (EXIF orientation).

        Args:
          photos: files, or RGB pixels; taken a few ahead of what is asked for.

        Raises:
          UserError: a photo cannot be read; it is the next one after those that were given.
        """

        def read(photo: str | Path | Image) -> Read[None]:
            if isinstance(photo, np.ndarray):
                return Read(None, photo)
            try:
                return Read(None, read_image(Path(photo), self.config.data.max_pixels))
            except UserError as error:
                return Read(None, error=error)

        for result in detect_all(self, (partial(read, photo) for photo in photos)):
            if result.found is None:
                raise result.error or AssertionError("neither found nor failed")
            yield result.found

    def rows(self, bucket: tuple[int, int]) -> int:
        """How many photos of a padded shape `detect_batch` takes."""
        devices = jax.local_devices()
        # On CPUs, large photos are computed one after another anyway (`PredictStep`).
        if devices[0].platform == "cpu" and math.prod(bucket) >= LARGE_PHOTO:
            return len(devices)
        return len(devices) * max(1, self.config.eval.batch_size // len(devices))

    def detect_batch(self, batch: Batch) -> Detections:
        """Detections [devices, B / devices, K] of a batch, which may still be being computed."""
        params, frozen = self._replicated
        found: Detections = self._predict_parallel(params, frozen, split_over_devices(batch))
        return found

    @cached_property
    def _predict_parallel(self) -> Any:
        return parallel_predict_step(self._step)

    @cached_property
    def _replicated(self) -> tuple[Any, Any]:
        return replicate((self._weights.params, self._weights.frozen))

    def maps(self, image: UInt8[np.ndarray, "H W 3"]) -> LocationMaps:
        """What the network computes at every location of an RGB photo; raises as `detect`."""
        batch = single_image_batch(image, self.config.data)
        found = self._compute_maps(self._weights.params, self._weights.frozen, batch)
        return maps_of_photo(found, batch)
