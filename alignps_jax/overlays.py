"""Points and heat maps over photos; images and pixels as in `visualize.py`."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float

from alignps_jax.visualize import (
    BLACK,
    CAPTION_SCALE,
    GREEN,
    LINE_HEIGHT,
    Color,
    Image,
    put_text,
    text_size,
)

# Told apart from each other, and from the green of people's centres.
CLOUD_COLORS: tuple[Color, ...] = (
    (255, 60, 200),
    (0, 225, 255),
    (255, 150, 0),
    (255, 240, 60),
    (150, 90, 255),
    (255, 60, 60),
)


def draw_point_clouds(
    image: Image,
    clouds: Sequence[Float[np.ndarray, "N 2"]],
    origins: Sequence[Float[np.ndarray, "2"]],
    centres: Float[np.ndarray, "K 2"],
) -> Image:
    """A copy of the image with points, each cloud in a colour of its own.

    Args:
      image: the photo.
      clouds: points x, y in pixels of the image (the middle of the first pixel is 0.5, 0.5);
        those beyond it are not seen.
      origins: a point per cloud that gets a ring of its colour.
      centres: points that are marked in green, over all others.
    """
    canvas = np.ascontiguousarray(image).copy()
    radius = max(3.0, min(canvas.shape[:2]) / 250)
    colors = [CLOUD_COLORS[number % len(CLOUD_COLORS)] for number in range(len(clouds))]
    for cloud, color in zip(clouds, colors, strict=True):
        for point in cloud:
            _draw_dot(canvas, point, radius + 1, BLACK)
            _draw_dot(canvas, point, radius, color)
    for origin, color in zip(origins, colors, strict=True):
        for width, shade in ((1.6, BLACK), (0.9, color)):
            _draw_dot(canvas, origin, 3 * radius, shade, thickness=round(width * radius))
    for centre in centres:
        _draw_dot(canvas, centre, 1.8 * radius, BLACK)
        _draw_dot(canvas, centre, 1.5 * radius, GREEN)
    return canvas


def _draw_dot(
    canvas: Image,
    point: Float[np.ndarray, "2"],
    radius: float,
    color: Color,
    thickness: int = cv2.FILLED,
) -> None:
    """A circle, placed to a sixteenth of a pixel."""
    if not (np.abs(point) < 10 * max(canvas.shape[:2])).all():
        return  # far outside: OpenCV's fixed-point coordinates would overflow
    x, y = (round(16 * (float(value) - 0.5)) for value in point)
    cv2.circle(canvas, (x, y), round(16 * radius), color, thickness, cv2.LINE_AA, shift=4)


def draw_heat(image: Image, heat: Float[np.ndarray, "h w"]) -> Image:
    """The image in grey, tinted by values from 0 to 1; `heat` covers it at any resolution."""
    height, width = image.shape[:2]
    heat = cv2.resize(np.clip(heat, 0, 1).astype(np.float32), (width, height))
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    colors = cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)
    colors = cv2.cvtColor(colors, cv2.COLOR_BGR2RGB)
    # Where nothing is similar the scene itself is to be seen.
    weight = 0.25 + 0.45 * heat[..., None]
    return np.round((1 - weight) * grey + weight * colors).astype(np.uint8)


def heat_scale(width: int) -> Image:
    """The colours of `draw_heat` from 0 to 1, with numbers below."""
    bar = draw_heat(np.full((16, width, 3), 128, np.uint8), np.linspace(0, 1, width)[None])
    scale = np.concatenate([bar, np.full((LINE_HEIGHT, width, 3), 255, np.uint8)])
    for value in np.linspace(0, 1, 6):
        text = f"{value:.1f}"
        text_width = text_size(text, CAPTION_SCALE)[0]
        x = round(np.clip(value * width - text_width / 2, 0, width - text_width))
        put_text(scale, text, x, len(scale) - 5, BLACK, CAPTION_SCALE)
    return scale
