"""Cut-outs, and the canvas and paint that they are made with."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipeline.synthetic.people import Color, Point

_ANGLES = np.linspace(0, 2 * math.pi, 16, endpoint=False)
_CIRCLE = np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), axis=1)


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A cut-out: color premultiplied with alpha (0 where alpha is 0), both `uint8`."""

    color: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"]

    def resized(self, height: int) -> Sprite:
        """The same cut-out `height` pixels tall."""
        width = max(2, round(self.alpha.shape[1] * height / self.alpha.shape[0]))
        shrinks = height < self.alpha.shape[0]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        size = (width, height)
        return Sprite(
            cv2.resize(self.color, size, interpolation=method),
            cv2.resize(self.alpha, size, interpolation=method),
        )


class Canvas:
    """Color and coverage that polygons are painted on; black where nothing is."""

    def __init__(self, height: int, width: int) -> None:
        self.color = np.zeros((height, width, 3), np.uint8)
        self.alpha = np.zeros((height, width), np.uint8)

    def polygon(self, points: np.ndarray | list[Point], paint: Paint) -> None:
        """Fills one polygon and draws its edge a little darker, so that parts stand apart."""
        corners = [np.round(np.asarray(points)).astype(np.int32)]
        if paint.texture is None:
            cv2.fillPoly(self.color, corners, paint.color)
        else:
            mask = np.zeros_like(self.alpha)
            cv2.fillPoly(mask, corners, 255)
            cv2.copyTo(paint.texture, mask, self.color)
        cv2.polylines(self.color, corners, True, darker(paint.color, 0.72), 1)
        cv2.fillPoly(self.alpha, corners, 255)

    def ellipse(self, center: Point, radii: Point, paint: Paint) -> None:
        """Fills an upright ellipse."""
        self.polygon(_CIRCLE * radii + center, paint)

    def limb(self, start: Point, end: Point, radii: Point, paint: Paint) -> None:
        """Fills the hull of two circles: a piece of arm or leg."""
        points = np.vstack((_CIRCLE * radii[0] + start, _CIRCLE * radii[1] + end))
        self.polygon(cv2.convexHull(points.astype(np.float32))[:, 0], paint)

    def cropped(self) -> Sprite:
        """What has been painted, without the empty border."""
        x, y, width, height = cv2.boundingRect(self.alpha)
        window = (slice(y, y + height), slice(x, x + width))
        return Sprite(self.color[window], self.alpha[window])


@dataclasses.dataclass(frozen=True)
class Paint:
    """A color, or a texture of the canvas' size whose main color it is."""

    color: Color
    texture: UInt8[np.ndarray, "H W 3"] | None = None

    def shaded(self, factor: float) -> Paint:
        """The same paint in the shade (factor below 1)."""
        texture = None if self.texture is None else cv2.convertScaleAbs(self.texture, alpha=factor)
        return Paint(darker(self.color, factor), texture)


def darker(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(channel * factor)) for channel in color)
    return red, green, blue
