"""What the network computes at every location of a photo, and what can be seen in it.

The sampling points of the neck's deformable convolutions (Paper, Fig. 5) and the similarity of
every location's embedding to a query. Level l of the pyramid has stride 2**l: its location
(column, row) covers the input's pixels from 2**l * column to 2**l * (column + 1), and stands for
their center, as in the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.nn.layers import SIZE_MULTIPLE
from alignps_jax.nn.model import matmul_precision
from alignps_jax.types import Batch, Outputs, UserError

# (y, x) steps from a location to the nine taps of a 3x3 convolution, row by row.
TAPS = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1), indexing="ij"), axis=-1).reshape(9, 2)
# (y, x) steps from the pixel at or before a position to the four around it.
_CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
_OUTPUT = "output3"
_OUTPUT_STRIDE = 8


@struct.dataclass
class MapOutputs:
    """The maps of a batch as they leave the network, bucket padding included.

    `offsets` holds the channels of the `offset` convolution of each deformable convolution of the
    neck, by its name (`lateral3`): y0, x0, y1, x1, ... of the nine taps.
    """

    outputs: tuple[Outputs, ...]
    offsets: dict[str, Float[Array, "B _h _w 18"]]


@dataclasses.dataclass(frozen=True)
class LocationMaps:
    """The maps of one photo on the host, without bucket padding.

    `embeddings` has one map per level that is searched, of vectors of length one (or zero), and
    `strides` their strides. `offsets[name][row, column, tap]` is (y, x) in locations of that
    convolution's input. `size` is the height and width that the photo was resized to, `scale`
    the factors (x, y) by which its coordinates were multiplied.
    """

    embeddings: tuple[Float[np.ndarray, "_h _w D"], ...]
    strides: tuple[int, ...]
    offsets: Mapping[str, Float[np.ndarray, "h w 9 2"]]
    size: Int[np.ndarray, "2"]
    scale: Float[np.ndarray, "2"]


@dataclasses.dataclass(frozen=True)
class SamplingPoints:
    """Where a location of P3 looks in the photo, through one lateral convolution.

    `xy` are pixels of the photo, tap by tap of the output convolution and, within it, of the
    lateral one. `used` is False where the output convolution's tap falls outside of the map, where
    it reads zeros.
    """

    xy: Float[np.ndarray, "81 2"]
    used: Bool[np.ndarray, "81"]


def compute_maps(
    model: nn.Module, precision: str, params: Any, frozen: Any, batch: Batch
) -> MapOutputs:
    """Runs the network and keeps what its offset convolutions say on the way."""
    with matmul_precision(precision):
        outputs, captured = model.apply(
            {"params": params, "frozen": frozen},
            batch.image,
            batch.size,
            capture_intermediates=_is_offset_of_neck,
            mutable=["intermediates"],
        )
    neck = captured.get("intermediates", {}).get("neck", {})
    offsets = {name: layer["offset"]["__call__"][0] for name, layer in neck.items()}
    return MapOutputs(outputs, offsets)


def _is_offset_of_neck(module: nn.Module, method: str) -> bool:
    return method == "__call__" and module.path[:1] == ("neck",) and module.name == "offset"


def maps_of_photo(maps: MapOutputs, batch: Batch) -> LocationMaps:
    """The maps of a batch of one image, on the host, cut to the region the network looks at."""
    host: Any = jax.device_get(maps)
    bucket = batch.image.shape[1]
    size = np.asarray(batch.size[0])
    extent = -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE

    def cut(array: np.ndarray) -> tuple[np.ndarray, int]:
        stride = bucket // array.shape[1]
        height, width = -(-extent // stride)
        return array[0, :height, :width].astype(np.float32), stride

    embeddings, strides = zip(*(cut(level.embeddings) for level in host.outputs), strict=True)
    return LocationMaps(
        embeddings=tuple(_normalized(embedding) for embedding in embeddings),
        strides=strides,
        offsets={
            name: (cropped := cut(array)[0]).reshape(*cropped.shape[:2], 9, 2)
            for name, array in host.offsets.items()
        },
        size=size,
        scale=np.asarray(batch.scale[0]),
    )


def _normalized(vectors: Float[np.ndarray, "h w D"]) -> Float[np.ndarray, "h w D"]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def similarity_map(
    maps: LocationMaps, embedding: Float[np.ndarray, "D"]
) -> Float[np.ndarray, "H W"]:
    """Cosine similarity of every pixel of the resized photo (`maps.size`) to an embedding.

    Bilinear between the locations; the largest of the levels where there are several.
    """
    height, width = maps.size
    levels = []
    for level, stride in zip(maps.embeddings, maps.strides, strict=True):
        cosine = level @ embedding.astype(np.float32)
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
) -> SamplingPoints:
    """Where a location (row, column) of P3 looks through the lateral convolution of a level.

    The output convolution's nine taps fall between the pixels of its input, and the pixels
    around a tap (up to four, of which upsampling makes several the same) each look at nine points
    of the backbone's map. The nine points of a tap are means of these, weighted as bilinear
    interpolation weighs the pixels.

    Raises:
      UserError: the network has no such deformable convolutions.
    """
    output, lateral = _offsets(maps, _OUTPUT), _offsets(maps, f"lateral{level}")
    stride = 2**level
    row, column = (int(index) for index in location)
    taps = np.array([row, column]) + TAPS + output[row, column]
    # Cells of the level that the pixels around each tap come from, by nearest upsampling.
    corners = np.floor(taps).astype(int)[:, None] + _CORNERS
    weights = np.prod(1 - np.abs(taps[:, None] - corners), axis=-1)
    inside = ((corners >= 0) & (corners < output.shape[:2])).all(axis=-1)
    weights = np.where(inside, weights, 0.0)
    cells = np.where(inside[..., None], corners, 0) // (stride // _OUTPUT_STRIDE)
    points = cells[:, :, None] + TAPS + lateral[cells[..., 0], cells[..., 1]]
    total = weights.sum(axis=1)
    share = weights / np.where(total > 0, total, 1.0)[:, None]
    mean = np.einsum("tc,tckd->tkd", share, points).reshape(81, 2)
    return SamplingPoints(
        xy=(mean[:, ::-1] + 0.5) * stride / maps.scale,
        used=np.repeat(total > 0, 9),
    )


def _offsets(maps: LocationMaps, name: str) -> Float[np.ndarray, "h w 9 2"]:
    if name not in maps.offsets:
        found = ", ".join(maps.offsets) or "none"
        raise UserError(
            f"sampling points: {name} of this network's neck is not a deformable convolution "
            f"(found {found}); expected config.model.lateral_deform=True, output_deform=True and "
            "3 in levels"
        )
    return maps.offsets[name]
