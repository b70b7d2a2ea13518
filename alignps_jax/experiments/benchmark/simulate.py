"""What the benchmark measures with: made-up weights, photos, people and detections."""

from __future__ import annotations

import cv2
import jax
import numpy as np
from flax import traverse_util
from jaxtyping import UInt8

from alignps_jax.nn.model import AlignPS, Params, init_variables
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol
from data_pipeline.datasets import PreparedSplit
from data_pipeline.sources.source import Queries, all_but, search_everywhere
from data_pipeline.transforms import Size

# Under random weights with these factors the activations of a ResNet-50 keep a sane size and
# offsets are of one or two pixels, as trained ones are: what is read from memory depends on it.
_STEM_FACTOR, _RESIDUAL_FACTOR = 1 / 16, 1 / 4
_JPEG_QUALITY = (cv2.IMWRITE_JPEG_QUALITY, 92)


def plausible_weights(model: AlignPS) -> tuple[Params, Params]:
    """(params, frozen) of a network that was not trained, but behaves as if it were."""
    return as_if_trained(*init_variables(model, jax.random.key(0)))


def as_if_trained(params: Params, frozen: Params) -> tuple[Params, Params]:
    """Initial (params, frozen) times what makes them plausible."""
    stem = params["backbone"]["conv1"]
    stem = {**stem, "kernel": stem["kernel"] * _STEM_FACTOR}
    params = {**params, "backbone": {**params["backbone"], "conv1": stem}}
    flat = traverse_util.flatten_dict(frozen)
    factors = {path: _RESIDUAL_FACTOR for path in flat if path[-2:] == ("bn3", "scale")}
    flat = {path: leaf * factors.get(path, 1.0) for path, leaf in flat.items()}
    return params, traverse_util.unflatten_dict(flat)


def made_up_people(images: int, size: Size, *, people: int, identities: int) -> Annotations:
    """So many people on each image of (height, width); every second one has an identity."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.8, (images, people, 2))
    boxes = np.concatenate([corner, corner + 0.2], axis=2) * np.tile(size[::-1], 2)
    return Annotations(
        names=tuple(f"photo-{number}.jpg" for number in range(images)),
        boxes=tuple(boxes.astype(np.float32)),
        identity=tuple(rng.integers(0, identities, (images, people), dtype=np.int32)),
        labeled=tuple(np.tile(np.arange(people) % 2 == 0, (images, 1))),
        camera=np.zeros(images, np.int32),
    )


def made_up_split(images: int, size: Size, *, people: int = 4) -> PreparedSplit:
    """Photos of (height, width) with some people each.

    Detail falls off with frequency as in natural images, and the JPEG quality is a camera's, so
    that a pixel takes as many bytes, and as long to decode, as one of a real photo.
    """
    rng = np.random.default_rng(0)
    annotations = made_up_people(images, size, people=people, identities=people)
    jpegs = [cv2.imencode(".jpg", _photo(rng, size), _JPEG_QUALITY)[1] for _ in range(images)]
    sizes = np.tile(np.array(size, np.int32), (images, 1))
    return PreparedSplit(annotations, sizes, tuple(jpeg.tobytes() for jpeg in jpegs))


def _photo(rng: np.random.Generator, size: Size) -> UInt8[np.ndarray, "H W 3"]:
    """Noise of all scales, each twice as fine and a little fainter than the one before."""
    height, width = size
    photo = np.full((height, width, 3), 128, np.float32)
    side, strength = 4, 40.0
    while side < max(size):
        noise = rng.normal(0, strength, (side, side, 3)).astype(np.float32)
        photo += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        side, strength = 2 * side, 0.62 * strength
    return photo.clip(0, 255).astype(np.uint8)


def made_up_detections(people: Annotations, dimension: int) -> GalleryDetections:
    """Everybody, a little off, with an embedding near that of their identity."""
    rng = np.random.default_rng(1)
    identity, boxes = np.stack(people.identity), np.stack(people.boxes)
    looks = rng.normal(size=(identity.max() + 1, dimension))
    embeddings = looks[identity.ravel()] + rng.normal(0, 2, (identity.size, dimension))
    return GalleryDetections(
        names=people.names,
        offsets=identity.shape[1] * np.arange(len(identity) + 1),
        boxes=(boxes + rng.normal(0, 3, boxes.shape)).reshape(-1, 4).astype(np.float32),
        scores=np.sort(rng.uniform(0, 1, identity.shape))[:, ::-1].ravel().astype(np.float32),
        embeddings=unit_rows(embeddings),
    )


def made_up_protocol(people: Annotations, queries: int) -> SearchProtocol:
    """The first person of some images is searched in all other images, as in PRW."""
    images = np.random.default_rng(2).permutation(len(people.names))[:queries]
    found = Queries(
        image=images,
        box=np.array([people.boxes[image][0] for image in images]),
        identity=np.array([people.identity[image][0] for image in images]),
    )
    return search_everywhere("all", people, found, all_but(len(people.names), images))[0]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Float32 vectors of length one."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
