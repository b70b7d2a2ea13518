"""Pictures: detections, search results in the manner of the paper's Fig. 7, and what they share.

Images are RGB `uint8`, layout HWC; boxes are x1, y1, x2, y2 in pixels of their image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from alignps_jax.report import write_atomically
from alignps_jax.types import UserError

Color = tuple[int, int, int]
Image = UInt8[np.ndarray, "H W 3"]

YELLOW: Color = (255, 221, 0)
GREEN: Color = (0, 190, 60)
RED: Color = (235, 35, 35)
BLUE: Color = (40, 120, 255)
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)

_FONT = cv2.FONT_HERSHEY_SIMPLEX

# Layout of the search picture, in pixels.
_SCENE_HEIGHT = 170
_SCENE_WIDTH = 340  # a wider scene (panorama) is scaled down to this
_CROP_HEIGHT = 280
_CELL_WIDTH = 200  # a narrower panel gets a margin, so that its caption can be read
GAP = 12
CAPTION_SCALE = 0.55
LINE_HEIGHT = 22
_CROP_CONTEXT = 0.1  # share of the box's sides that is shown around it


@dataclasses.dataclass(frozen=True)
class Panel:
    """A person in a photo: the box is yellow for a query, else it says whether it is right.

    `caption` may have several lines. `match` is None where no ground truth is known.
    """

    image: Image
    box: Float[np.ndarray, "4"]
    caption: str
    match: bool | None = None


@dataclasses.dataclass(frozen=True)
class RankingRow:
    """A query and what was found for it, most similar first."""

    query: Panel
    results: tuple[Panel, ...]


def result_caption(rank: int, similarity: float, name: str) -> str:
    """The caption of the result of a rank (from 1): two lines."""
    return f"#{rank}  similarity {similarity:.2f}\n{name}"


def read_image(path: Path) -> Image:
    """Reads a user's photo as a viewer shows it, with the EXIF orientation applied.

    Raises:
        UserError: the file cannot be read, is not an image, or ends before the image does.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # Decoders fill up what is missing of a JPEG with grey; the other formats they refuse.
    if data.startswith(b"\xff\xd8") and not _jpeg_is_complete(data):
        raise UserError(f"{path}: the JPEG file is truncated ({len(data)} bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        raise UserError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise UserError(f"{path}: found no complete image, expected a JPEG, PNG or similar file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether the end marker of a file's (first) JPEG image is there.

    Segments are jumped over by their length, so that the end of a thumbnail within one does not
    count; within coded data 0xFF is a marker unless 0x00 or a restart number follows. Whatever
    a camera appends after the end does not matter.
    """
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 1:
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # filling before a marker
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # without length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def write_image(path: Path, image: Image) -> None:
    """Writes a PNG or JPEG file (by its suffix), as a whole or not at all.

    Raises:
        UserError: the suffix is not .png, .jpg or .jpeg, the picture is too large for the format,
            or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: found the suffix {suffix!r}, expected .png, .jpg or .jpeg")
    quality = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    encoded, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    if not encoded:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width}x{height} pixels are too many for {suffix}, try .png")
    write_atomically(path, data.tobytes())


def draw_detections(
    image: Image,
    boxes: Float[np.ndarray, "K 4"],
    scores: Float[np.ndarray, "K"],
    color: Color = GREEN,
) -> Image:
    """A copy of the photo with the boxes and their scores; lines and letters grow with it.

    The most confident detection is drawn last, over the others.
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
    x1, y1, x2, y2 = _clipped(box, image_width, height)
    # A line of `width` pixels around the edge reaches half of that to either side.
    inset = width // 2
    cv2.rectangle(
        canvas,
        (max(x1, inset), max(y1, inset)),
        (min(x2, image_width - 1 - inset), min(y2, height - 1 - inset)),
        color,
        width,
    )


def _clipped(box: Float[np.ndarray, "4"], width: int, height: int) -> tuple[int, int, int, int]:
    """Rounds to pixels of the image; x1 <= x2 and y1 <= y2, both ends belong to the box."""
    x1, x2 = np.clip(np.round(box[[0, 2]]), 0, width - 1).astype(int)
    y1, y2 = np.clip(np.round(box[[1, 3]]), 0, height - 1).astype(int)
    return int(x1), int(y1), int(max(x1, x2)), int(max(y1, y2))


def text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Width, height above the base line and below it."""
    (width, height), below = cv2.getTextSize(text, _FONT, scale, _text_thickness(scale))
    return width, height, below


def _text_thickness(scale: float) -> int:
    return max(1, round(scale * 1.8))


def put_text(canvas: Image, text: str, x: int, baseline: int, color: Color, scale: float) -> None:
    """Writes into `canvas`; x and baseline are the pixel where the text begins."""
    cv2.putText(
        canvas, text, (x, baseline), _FONT, scale, color, _text_thickness(scale), cv2.LINE_AA
    )


def draw_label(
    canvas: Image, box: Float[np.ndarray, "4"], text: str, color: Color, scale: float
) -> None:
    """Writes on a filled background above the box, or within it at the image's upper edge."""
    height, width = canvas.shape[:2]
    x1, y1, _, _ = _clipped(box, width, height)
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


def ranking_picture(rows: Iterable[RankingRow], max_results: int = 5) -> Image:
    """A grid with a row per query: the query, then its first `max_results` results.

    A panel shows the caption, the person enlarged, and the scene with the person's box. Boxes
    are yellow for the query, green or red for a right or wrong result, blue where that is not
    known. Rows may come from a generator: only their reduced panels are kept.
    """
    return grid_picture([_row_cells(row, max_results) for row in rows])


def grid_picture(grid: Sequence[Sequence[Image]]) -> Image:
    """Rows of cells on white, with a grey line between rows, which may differ in length.

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


def _row_cells(row: RankingRow, max_results: int) -> list[Image]:
    """The row's panels, drawn at their final size; all are equally high."""
    panels = [row.query, *row.results[:max_results]]
    caption_lines = max(len(panel.caption.splitlines()) for panel in panels)
    cells = [_panel_cell(row.query, YELLOW, caption_lines)]
    for panel in panels[1:]:
        color = BLUE if panel.match is None else GREEN if panel.match else RED
        cells.append(_panel_cell(panel, color, caption_lines))
    if not row.results:
        empty = np.full((cells[0].shape[0], _CELL_WIDTH, 3), 255, np.uint8)
        put_text(empty, "no detection", 0, LINE_HEIGHT - 8, BLACK, CAPTION_SCALE)
        cells.append(empty)
    return cells


def _panel_cell(panel: Panel, color: Color, caption_lines: int) -> Image:
    """Caption, enlarged person and scene below each other."""
    scene = _scene(panel, color)
    width = max(_CELL_WIDTH, scene.shape[1])
    crop = _enlarged_person(panel, color, width)
    scene_top = _CROP_HEIGHT + GAP // 2
    cell = np.full((scene_top + _SCENE_HEIGHT, width, 3), 255, np.uint8)
    cell[: crop.shape[0], : crop.shape[1]] = crop
    cell[scene_top : scene_top + scene.shape[0], : scene.shape[1]] = scene
    return captioned(cell, panel.caption, caption_lines)


def captioned(image: Image, caption: str, lines: int) -> Image:
    """The image below `lines` lines of caption, each shortened to the image's width."""
    strip = np.full((lines * LINE_HEIGHT, image.shape[1], 3), 255, np.uint8)
    for number, line in enumerate(caption.splitlines(), start=1):
        text = shortened(line, image.shape[1])
        put_text(strip, text, 0, number * LINE_HEIGHT - 8, BLACK, CAPTION_SCALE)
    return np.concatenate([strip, image])


def _scene(panel: Panel, color: Color) -> Image:
    """The photo at the common height with the box; a panorama gets lower instead of wider."""
    scene, factor = fitted(panel.image, _SCENE_WIDTH, _SCENE_HEIGHT)
    draw_box(scene, np.asarray(panel.box) * factor, color, 2)
    return scene


def _enlarged_person(panel: Panel, color: Color, max_width: int) -> Image:
    """The box and a little around it, with a frame that says whether it is the right person."""
    height, width = panel.image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in panel.box)
    context = _CROP_CONTEXT * np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1])
    left, top, right, bottom = _clipped(np.array([x1, y1, x2, y2]) + context, width, height)
    crop, _ = fitted(panel.image[top : bottom + 1, left : right + 1], max_width, _CROP_HEIGHT)
    cv2.rectangle(crop, (1, 1), (crop.shape[1] - 2, crop.shape[0] - 2), color, 3)
    if panel.match is not None:
        # In words as well, for those who cannot tell red from green.
        word = "right" if panel.match else "wrong"
        corner = np.array([0.0, crop.shape[0], 0.0, crop.shape[0]])
        draw_label(crop, corner, word, color, CAPTION_SCALE)
    return crop


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
