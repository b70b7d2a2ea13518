"""Pictures: detections, search results in the manner of Paper, Fig. 7, and what they share.

Images are RGB `uint8`, layout HWC; boxes are x1, y1, x2, y2 in pixels of their image.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float

from alignps_jax.media.photos import Image

Color = tuple[int, int, int]

YELLOW: Color = (255, 221, 0)
GREEN: Color = (0, 190, 60)
RED: Color = (235, 35, 35)
BLUE: Color = (40, 120, 255)
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)

_FONT = cv2.FONT_HERSHEY_SIMPLEX

GAP = 12
CAPTION_SCALE = 0.55
LINE_HEIGHT = 22


def draw_detections(
    image: Image,
    boxes: Float[np.ndarray, "K 4"],
    scores: Float[np.ndarray, "K"],
    color: Color = GREEN,
) -> Image:
    """A copy of the photo with the boxes and their scores; lines and letters grow with it.

    The detection with the best score is drawn last, over the others.
    """
    canvas = np.ascontiguousarray(image).copy()
    short_side = min(canvas.shape[:2])
    width = max(1, round(short_side / 300))
    scale = float(np.clip(short_side / 1300, 0.4, 2.0))
    order = np.argsort(scores, kind="stable")
    for box in boxes[order]:
        draw_box(canvas, box, color, width)
    for box, score in zip(boxes[order], scores[order], strict=True):
        draw_label(canvas, box, f"{score:.2f}", color, scale)
    return canvas


def draw_box(canvas: Image, box: Float[np.ndarray, "4"], color: Color, width: int) -> None:
    """Draws a frame that stays within the image, so that no side of it vanishes."""
    height, image_width = canvas.shape[:2]
    x1, y1, x2, y2 = clipped(box, image_width, height)
    # A line of `width` pixels around the edge reaches half of that to either side.
    inset = width // 2
    cv2.rectangle(
        canvas,
        (max(x1, inset), max(y1, inset)),
        (min(x2, image_width - 1 - inset), min(y2, height - 1 - inset)),
        color,
        width,
    )


def clipped(box: Float[np.ndarray, "4"], width: int, height: int) -> tuple[int, int, int, int]:
    """Rounds to pixels of the image; x1 <= x2 and y1 <= y2, both ends belong to the box."""
    x1, x2 = np.clip(np.round(box[[0, 2]]), 0, width - 1).astype(int)
    y1, y2 = np.clip(np.round(box[[1, 3]]), 0, height - 1).astype(int)
    return int(x1), int(y1), int(max(x1, x2)), int(max(y1, y2))


def text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Width, height above the base line and below it."""
    text, thickness = _drawable(text), _text_thickness(scale)
    (width, height), below = cv2.getTextSize(text, _FONT, scale, thickness)
    return width, height, below


def _drawable(text: str) -> str:
    """The text without what is no character, as names of files may have; OpenCV crashes on it."""
    return text.encode("utf-8", "replace").decode()


def _text_thickness(scale: float) -> int:
    return max(1, round(scale * 1.8))


def put_text(canvas: Image, text: str, x: int, baseline: int, color: Color, scale: float) -> None:
    """Writes into `canvas`; x and baseline are the pixel where the text begins."""
    text, thickness = _drawable(text), _text_thickness(scale)
    cv2.putText(canvas, text, (x, baseline), _FONT, scale, color, thickness, cv2.LINE_AA)


def draw_label(
    canvas: Image, box: Float[np.ndarray, "4"], text: str, color: Color, scale: float
) -> None:
    """Writes on a filled background above the box, or within it at the image's upper edge."""
    height, width = canvas.shape[:2]
    x1, y1, _, _ = clipped(box, width, height)
    text_width, above, below = text_size(text, scale)
    pad = max(1, round(4 * scale))
    label_height = above + below + 2 * pad
    left = int(np.clip(x1, 0, max(0, width - text_width - 2 * pad)))
    top = y1 - label_height if y1 >= label_height else y1
    cv2.rectangle(
        canvas, (left, top), (left + text_width + 2 * pad, top + label_height), color, cv2.FILLED
    )
    put_text(canvas, text, left + pad, top + pad + above, _readable_on(color), scale)


def _readable_on(color: Color) -> Color:
    red, green, blue = color
    return BLACK if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else WHITE


def grid_picture(grid: Sequence[Sequence[Image]]) -> Image:
    """Rows of cells on white, with a gray line between rows, which may differ in length.

    A row is as high as its highest cell, a column as wide as its widest one.
    """
    columns = max((len(cells) for cells in grid), default=0)
    widths = [
        max(cells[column].shape[1] for cells in grid if column < len(cells))
        for column in range(columns)
    ]
    heights = [max(cell.shape[0] for cell in cells) for cells in grid]
    total_width = sum(widths) + GAP * (columns + 1)
    height = GAP + sum(row_height + 2 * GAP + 1 for row_height in heights)
    picture = np.full((height, max(total_width, GAP), 3), 255, np.uint8)
    top = GAP
    for cells, row_height in zip(grid, heights, strict=True):
        left = GAP
        for cell, width in zip(cells, widths, strict=False):
            picture[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
            left += width + GAP
        top += row_height + GAP
        picture[top : top + 1] = 200
        top += 1 + GAP
    return picture[: -1 - GAP] if grid else picture


def captioned(image: Image, caption: str, lines: int) -> Image:
    """The image below `lines` lines of caption, each shortened to the image's width."""
    strip = np.full((lines * LINE_HEIGHT, image.shape[1], 3), 255, np.uint8)
    for number, line in enumerate(caption.splitlines(), start=1):
        text = shortened(line, image.shape[1])
        put_text(strip, text, 0, number * LINE_HEIGHT - 8, BLACK, CAPTION_SCALE)
    return np.concatenate([strip, image])


def fitted(image: Image, max_width: int, max_height: int) -> tuple[Image, float]:
    """Scales an image, either way, to the largest size that fits; also returns the factor."""
    factor = min(max_width / image.shape[1], max_height / image.shape[0])
    size = [max(1, round(side * factor)) for side in (image.shape[1], image.shape[0])]
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation), factor


def shortened(text: str, width: int) -> str:
    """Takes out as much of the middle as is needed for the text to fit."""
    for kept in range(len(text), 0, -1):
        head = (kept + 1) // 2
        candidate = (
            text if kept == len(text) else f"{text[:head]}...{text[len(text) - kept + head :]}"
        )
        if text_size(candidate, CAPTION_SCALE)[0] <= width:
            return candidate
    return ""


# Told apart from each other, and from the green of people's centers.
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
    clouds: Sequence[Float[np.ndarray, "_N 2"]],
    origins: Sequence[Float[np.ndarray, "2"]],
    centers: Float[np.ndarray, "K 2"],
) -> Image:
    """A copy of the image with points, each cloud in a color of its own.

    Args:
      image: the photo.
      clouds: points x, y in pixels of the image (the middle of the first pixel is 0.5, 0.5);
        those beyond it are not seen.
      origins: a point per cloud that gets a ring of its color.
      centers: points that are marked in green, over all others.
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
    for center in centers:
        _draw_dot(canvas, center, 1.8 * radius, BLACK)
        _draw_dot(canvas, center, 1.5 * radius, GREEN)
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
    """The image in gray, tinted by values from 0 to 1; `heat` covers it at any resolution."""
    height, width = image.shape[:2]
    heat = cv2.resize(np.clip(heat, 0, 1).astype(np.float32), (width, height))
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    colors = cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)
    colors = cv2.cvtColor(colors, cv2.COLOR_BGR2RGB)
    # Where nothing is similar the scene itself is to be seen.
    weight = 0.25 + 0.45 * heat[..., None]
    return np.round((1 - weight) * gray + weight * colors).astype(np.uint8)


def heat_scale(width: int) -> Image:
    """The colors of `draw_heat` from 0 to 1, with numbers below."""
    bar = draw_heat(np.full((16, width, 3), 128, np.uint8), np.linspace(0, 1, width)[None])
    scale = np.concatenate([bar, np.full((LINE_HEIGHT, width, 3), 255, np.uint8)])
    for value in np.linspace(0, 1, 6):
        text = f"{value:.1f}"
        text_width = text_size(text, CAPTION_SCALE)[0]
        x = round(np.clip(value * width - text_width / 2, 0, width - text_width))
        put_text(scale, text, x, len(scale) - 5, BLACK, CAPTION_SCALE)
    return scale
