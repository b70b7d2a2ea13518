"""Sampling points (Paper, Fig. 5) and similarities of all locations of a photo, for pictures.

A location (column, row) of level l of the pyramid, with stride 2**l, stands for the center of the
input's pixels from 2**l * column to 2**l * (column + 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignps_jax.arrays import l2_normalize
from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.layers import round_up
from alignps_jax.types import Batch, UserError

# (y, x) steps from a location to the nine taps of a 3x3 convolution, row by row.
TAPS = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1), indexing="ij"), axis=-1).reshape(9, 2)
_OUTPUT = "output3"
_OUTPUT_STRIDE = 8


@dataclasses.dataclass(frozen=True)
class LocationMaps:
    """The maps of one photo on the host, without bucket padding.

    `offsets[name][row, column, tap]` is (y, x) in locations of the input of the neck's deformable
    convolution of that name, such as `lateral3`.
    """

    embeddings: tuple[Float[np.ndarray, "_h _w D"], ...]  # of the searched levels, length 1 or 0
    strides: tuple[int, ...]  # of these
    offsets: Mapping[str, Float[np.ndarray, "h w 9 2"]]
    size: Int[np.ndarray, "2"]  # height and width of the resized photo
    scale: Float[np.ndarray, "2"]  # factors (x, y) from the photo's coordinates to its


@partial(jax.jit, static_argnums=0)
def _compute(step: PredictStep, params: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
    """The embeddings of each level, and the outputs of the neck's offset convolutions by name."""
    with jax.default_matmul_precision(step.config.precision):
        outputs, captured = step.model.apply(
            {"params": params, "frozen": frozen},
            batch.image,
            batch.size,
            capture_intermediates=lambda module, _: module.path[::2] == ("neck", "offset"),
            mutable=["intermediates"],
        )
    neck = captured.get("intermediates", {}).get("neck", {})
    offsets = {name: layer["offset"]["__call__"][0] for name, layer in neck.items()}
    return [l2_normalize(level.embeddings) for level in outputs], offsets


def location_maps(step: PredictStep, params: Any, frozen: Any, batch: Batch) -> LocationMaps:
    """The maps of a batch of one photo, cut to what the network looks at."""
    if step.config.branch == "roi":  # locations have no such embeddings
        raise UserError("config.eval.branch: found 'roi', expected 'both' or 'dense' for heat maps")
    embeddings, offsets = _compute(step, params, frozen, batch)
    bucket, valid = batch.image.shape[1], np.asarray(round_up(jnp.asarray(batch.size)))[0]

    def cut(array: Array) -> np.ndarray:
        height, width = -(-valid // (bucket // array.shape[1]))
        return np.asarray(array)[0, :height, :width]

    return LocationMaps(
        embeddings=tuple(map(cut, embeddings)),
        strides=tuple(bucket // array.shape[1] for array in embeddings),
        offsets={name: cut(x.reshape(*x.shape[:3], 9, 2)) for name, x in offsets.items()},
        size=np.asarray(batch.size[0]),
        scale=np.asarray(batch.scale[0]),
    )


def similarity_map(
    maps: LocationMaps, embedding: Float[np.ndarray, "D"]
) -> Float[np.ndarray, "H W"]:
    """Cosine similarity of each pixel of the resized photo (`maps.size`) to an embedding.

    Bilinear between locations; the largest of the levels. Of two branches, the dense one counts.
    """
    height, width = maps.size
    dense = embedding[: maps.embeddings[0].shape[-1]].astype(np.float32)
    dense /= max(float(np.linalg.norm(dense)), 1e-12)
    levels = []
    for level, stride in zip(maps.embeddings, maps.strides, strict=True):
        cosine = level @ dense
        enlarged = (cosine.shape[1] * stride, cosine.shape[0] * stride)
        levels.append(cv2.resize(cosine, enlarged, interpolation=cv2.INTER_LINEAR))
    return np.max([level[:height, :width] for level in levels], axis=0)


def nearest_location(maps: LocationMaps, xy: Float[np.ndarray, "2"]) -> Int[np.ndarray, "2"]:
    """(row, column) of the location of P3 whose cell holds a point of the photo."""
    limits = np.array(_offsets(maps, _OUTPUT).shape[:2]) - 1
    cell = np.floor(np.asarray(xy) * maps.scale / _OUTPUT_STRIDE).astype(int)[::-1]
    return np.clip(cell, 0, limits)


def location_xy(maps: LocationMaps, location: Int[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    """The photo's pixel (x, y) that a location (row, column) of P3 stands for."""
    return (np.asarray(location)[::-1] + 0.5) * _OUTPUT_STRIDE / maps.scale


def sampling_points(
    maps: LocationMaps, location: Int[np.ndarray, "2"], level: int
) -> Float[np.ndarray, "81 2"]:
    """Where a location (row, column) of P3 looks through the lateral convolution of a level.

    Returns pixels (x, y) of the photo: for each tap of the output convolution, the nine taps of
    the lateral one. An output tap lies between pixels, so its nine points are the bilinear means of
    theirs; NaN outside of the map. UserError if there are no such convolutions.
    """
    from scipy.ndimage import map_coordinates  # slow to import, and rarely needed

    output, lateral = _offsets(maps, _OUTPUT), _offsets(maps, f"lateral{level}")
    (height, width), stride = output.shape[:2], 2**level
    grid = np.moveaxis(np.indices(lateral.shape[:2]), 0, -1)[:, :, None]
    points: np.ndarray = grid + TAPS + lateral
    for axis in (0, 1):  # nearest upsampling to the size of P3
        points = points.repeat(stride // _OUTPUT_STRIDE, axis)
    taps = (location + TAPS + output[tuple(location)]).T
    # With a channel of ones, whose values are the shares of the taps inside of the map.
    channels = [*np.moveaxis(points.reshape(height, width, 18), -1, 0), np.ones((height, width))]
    *read, share = (map_coordinates(x, taps, order=1, mode="grid-constant") for x in channels)
    with np.errstate(invalid="ignore"):
        mean = (np.stack(read, axis=-1) / share[:, None]).reshape(81, 2)
    return (mean[:, ::-1] + 0.5) * stride / maps.scale


def _offsets(maps: LocationMaps, name: str) -> Float[np.ndarray, "h w 9 2"]:
    if name not in maps.offsets:
        raise UserError(
            f"sampling points: {name} of this network's neck is not a deformable convolution; "
            "expected config.model.lateral_deform=True, output_deform=True and 3 in levels"
        )
    return maps.offsets[name]
