"""A tiny network with random weights that finds a few people in any photo, and photos for it."""

import cv2
import jax
import numpy as np

from alignps_jax.checkpoint.store import Checkpoints
from alignps_jax.files import write_image
from alignps_jax.inference.predict import inference_model
from alignps_jax.nn.model import weights_template
from alignps_jax.types import OIMMemory, TrainState
from configs import tiny


def network_config(threshold=0.285, variant=""):
    """A network that finds at most five people of that score."""
    config = tiny.get_config(variant)
    config.data.max_pixels = 1_000_000
    config.eval.score_threshold = threshold
    config.eval.max_detections = 5
    return config.lock()


def write_checkpoint(folder, config, seed=0):
    """A checkpoint of random weights, as training would leave one."""
    template = weights_template(inference_model(config))
    rng = np.random.default_rng(seed)

    def random(leaf):
        return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

    params, frozen = jax.tree.map(random, (template.params, template.frozen))
    frozen = jax.tree.map(np.abs, frozen)  # there are variances
    params["head"]["scale0"] = np.ones((), np.float32)
    params["head"]["box_predictor"]["bias"] = np.array([1.5, 2, 1.5, 2], np.float32)
    memory = OIMMemory(np.ones((2, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(0))
    with Checkpoints(folder, keep=1, config=config) as checkpoints:
        checkpoints.save(TrainState(np.int32(7), params, frozen, (), memory), {})
    return folder


def photo(seed, height=96, width=128):
    """Colored blots, others for every seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_photos(folder, names, first=0):
    """A photo of its own for each name."""
    for seed, name in enumerate(names, first):
        write_image(folder / name, photo(seed))
