"""Person search in one's own photos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from alignps_jax import devices
from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.checkpoint.store import load_config, load_weights
from alignps_jax.inference.location_maps import LocationMaps, location_maps
from alignps_jax.inference.many import Photo, detect_all, join, people_of
from alignps_jax.inference.predict import PredictStep, inference_model
from alignps_jax.media import read_photo
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Batch, Detections, UserError, Weights
from data_pipeline.pipeline import single_image_batch

PhotoLike = str | Path | Image.Image | UInt8[np.ndarray, "_H _W 3"]


class Detector:
    """Finds the people of a photo and gives each an embedding.

    A photo is a file or a PIL image, both turned as their EXIF orientation says, or an RGB uint8
    array [H, W, 3]. Batches of `detect_many` have `rows` photos; `step` is the training step of the
    weights, `name` says where they come from, `folder` is the checkpoint of that step, if any.
    """

    def __init__(
        self,
        config: ConfigDict,
        weights: Weights,
        source: str = "weights in memory",
        folder: Path | None = None,
    ):
        self.config = config
        self.folder = folder
        self.step = int(weights.step)
        self.name = f"{source}, step {self.step}"
        count = jax.local_device_count()
        # CPUs gain nothing from larger batches, and `detect` then runs the same program.
        each = 1 if jax.default_backend() == "cpu" else max(1, config.eval.batch_size // count)
        self.rows = count * each
        self._step = PredictStep(inference_model(config), config.eval)
        self._params, self._frozen = devices.replicate((weights.params, weights.frozen))
        self._predict = devices.parallel_predict_step(self._step)

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: ConfigDict | None = None) -> Self:
        """Loads the last step of a workdir (or that which a split chose), or one step's folder.

        `config` replaces the checkpoint's own. Compiled programs go into the user's cache, unless
        JAX has a folder for them. UserError if there is no such checkpoint, or it does not fit.
        """
        if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            devices.use_compilation_cache()
        config = config or load_config(Path(path))
        template = weights_template(inference_model(config))
        folder, _ = chosen_step(Path(path), config)
        return cls(config, load_weights(folder, template), str(path), folder)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that makes embeddings, the weights above all, in hexadecimal digits."""
        branch = self.config.eval.branch if self.config.model.roi else ""
        digest = hashlib.sha256(branch.encode())
        for path, array in leaves_by_path((self._params, self._frozen)).items():
            values = np.ascontiguousarray(array)
            digest.update(f"{path} {values.dtype} {values.shape}".encode() + values.tobytes())
        return digest.hexdigest()

    def detect(self, photo: PhotoLike) -> Detections:
        """All detections [K] of a photo by the released code's inference rule, best first.

        All are valid; boxes are x1, y1, x2, y2 in the photo's own pixels, scores in [0, 1],
        embeddings of length one. UserError if `photo` is no photo, or cannot be read.
        """
        batch = join([self._batch(photo)], jax.local_device_count())
        return next(people_of(self.detect_batch(batch)))

    def detect_many(self, photos: Iterable[PhotoLike]) -> Iterator[Detections]:
        """The detections of each of many photos, in their order; see `detect`.

        Photos are read ahead in threads, and batches spread over all local devices. UserError comes
        in the turn of the photo that causes it.
        """

        def read(photo: PhotoLike) -> Photo[None]:
            try:
                return Photo(None, self._pixels(photo))
            except (UserError, OSError) as error:
                return Photo(None, error=error)

        tasks = (partial(read, photo) for photo in photos)
        for photo in detect_all(self.detect_batch, self.config.data, self.rows, tasks):
            if photo.found is None:
                raise photo.error or AssertionError("neither found nor failed")
            yield photo.found

    def detect_batch(self, batch: Batch) -> Detections:
        """Detections [devices, B / devices, K] of a batch, perhaps still being computed."""
        return self._predict(self._params, self._frozen, devices.split_over_devices(batch))

    def maps(self, photo: PhotoLike) -> LocationMaps:
        """The network's values at every location of a photo; raises as `detect`."""
        return location_maps(self._step, self._params, self._frozen, self._batch(photo))

    def _batch(self, photo: PhotoLike) -> Batch:
        return single_image_batch(self._pixels(photo), self.config.data)

    def _pixels(self, photo: Any) -> np.ndarray:
        if isinstance(photo, str | Path):
            return read_photo(Path(photo), self.config.data.max_pixels)
        # Pillow would cut numbers of more than 8 bits (modes I and F) to the first 256.
        if isinstance(photo, Image.Image) and photo.mode[0] not in "IF":
            photo = ImageOps.exif_transpose(photo).convert("RGB")
        pixels = np.asarray(photo)
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not pixels.size:
            raise UserError(
                f"photo: found {type(photo).__name__} ({pixels.dtype}, {pixels.shape}), expected a "
                "file, a PIL image of 8 bits per channel, or an RGB uint8 array (height, width, 3)"
            )
        return pixels
