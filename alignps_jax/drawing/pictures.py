"""Pictures: detections, and search results in the manner of Paper, Fig. 7.

Images are RGB `uint8`, layout HWC; boxes are x1, y1, x2, y2 in pixels of their image. Captions hold
names of files, which may be Chinese: OpenCV has the letters, matplotlib has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice

import cv2
import numpy as np
from jaxtyping import Float

from alignps_jax.media import Image

Color = tuple[int, int, int]

YELLOW: Color = (255, 221, 0)
GREEN: Color = (0, 190, 60)
RED: Color = (235, 35, 35)
BLUE: Color = (40, 120, 255)
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)

RESULTS_SHOWN = 5  # in a row: more would make each too small to see who it is
# Pixels: between cells, of a line of a caption, and the smallest width that a caption gets.
GAP, LINE_HEIGHT, MIN_WIDTH = 12, 22, 200
# Heights of the person and of the photo in a ranking; a panorama is scaled down to the width.
_PERSON_HEIGHT, SCENE_HEIGHT, _SCENE_WIDTH = 280, 170, 340
_FONT, _CAPTION_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.55


def draw_detections(
    image: Image, boxes: Float[np.ndarray, "K 4"], scores: Float[np.ndarray, "K"]
) -> Image:
    """A copy of the photo with the boxes and their scores; lines and letters grow with it.

    The detection with the best score is drawn last, over the others.
    """
    canvas = np.ascontiguousarray(image).copy()
    short_side = min(canvas.shape[:2])
    scale = float(np.clip(short_side / 1300, 0.4, 2.0))
    for one in np.argsort(scores, kind="stable"):
        draw_box(canvas, boxes[one], GREEN, max(1, round(short_side / 300)))
        draw_label(canvas, boxes[one], f"{scores[one]:.2f}", GREEN, scale)
    return canvas


def draw_box(canvas: Image, box: Float[np.ndarray, "4"], color: Color, width: int) -> None:
    """Draws a frame that stays within the image, so that no side of it vanishes."""
    corners = _clipped(canvas, box)
    inset = width // 2  # what a line reaches to either side
    limit = np.array(canvas.shape[1::-1]) - 1 - inset
    start, end = np.maximum(corners[:2], inset), np.minimum(corners[2:], limit)
    cv2.rectangle(canvas, start.tolist(), end.tolist(), color, width)


def draw_label(
    canvas: Image, box: Float[np.ndarray, "4"], text: str, color: Color, scale: float
) -> None:
    """Writes on a filled background above the box, or within it at the image's upper edge."""
    x, y = _clipped(canvas, box)[:2].tolist()
    (text_width, above), below = cv2.getTextSize(text, _FONT, scale, 1)
    pad = max(1, round(4 * scale))
    width, height = text_width + 2 * pad, above + below + 2 * pad
    left, top = max(0, min(x, canvas.shape[1] - width)), y - height if y >= height else y
    cv2.rectangle(canvas, (left, top), (left + width, top + height), color, cv2.FILLED)
    letters = BLACK if np.dot(color, (0.3, 0.59, 0.11)) > 110 else WHITE
    start = left + pad, top + pad + above
    cv2.putText(canvas, text, start, _FONT, scale, letters, 1, cv2.LINE_AA)


def _clipped(image: Image, box: Float[np.ndarray, "4"]) -> np.ndarray:
    """The box in whole pixels of the image; both ends belong to it, and x1 <= x2, y1 <= y2."""
    limit = np.array(image.shape[1::-1] * 2) - 1
    corners = np.clip(np.round(np.asarray(box, float)), 0, limit).astype(int)
    return np.concatenate([corners[:2], np.maximum(corners[:2], corners[2:])])


def fitted(image: Image, max_width: int, max_height: int) -> tuple[Image, float]:
    """Scales an image, either way, to the largest size that fits; also returns the factor."""
    factor = min(max_width / image.shape[1], max_height / image.shape[0])
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation), factor


def captioned(image: Image, *lines: str) -> Image:
    """The image below the lines of a caption, each shortened to its width."""
    image = _on_white(image, image.shape[0], max(image.shape[1], MIN_WIDTH))
    strip = np.full((len(lines) * LINE_HEIGHT, image.shape[1], 3), 255, np.uint8)
    for number, line in enumerate(lines, start=1):
        # OpenCV crashes on what is no character, as names of files may have.
        text = "".join(letter if letter.isprintable() else "?" for letter in line)
        text, start = shortened(text, strip.shape[1]), (0, number * LINE_HEIGHT - 8)
        cv2.putText(strip, text, start, _FONT, _CAPTION_SCALE, BLACK, 1, cv2.LINE_AA)
    return np.concatenate([strip, image])


def shortened(text: str, width: int) -> str:
    """Takes out as much of the middle of a caption as is needed to fit a width in pixels."""
    short = text
    for kept in range(len(text) - 1, 0, -1):
        if cv2.getTextSize(short, _FONT, _CAPTION_SCALE, 1)[0][0] <= width:
            break
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def grid_picture(rows: Iterable[list[Image]]) -> Image:
    """Rows of cells on white, with a gray line between rows, which may differ in length.

    Columns are as wide as the widest of all cells.
    """
    grid = list(rows)
    width = GAP + max(cell.shape[1] for cells in grid for cell in cells)
    total = width * max(map(len, grid))
    between = np.full((2 * GAP + 1, total, 3), 255, np.uint8)
    between[GAP] = 200
    parts = []
    for cells in grid:
        height = max(cell.shape[0] for cell in cells)
        line = np.concatenate([_on_white(cell, height, width) for cell in cells], axis=1)
        parts += [between, _on_white(line, height, total)]
    picture = np.concatenate(parts[1:])
    return cv2.copyMakeBorder(picture, GAP, GAP, GAP, 0, cv2.BORDER_CONSTANT, value=WHITE)


def _on_white(image: Image, height: int, width: int) -> Image:
    """The image at the upper left of a white one of that size."""
    below, right = height - image.shape[0], width - image.shape[1]
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=WHITE)


@dataclasses.dataclass(frozen=True)
class Result:
    """A person that was found: the photo with its name, the box in it, and how similar it is.

    `match` says whether it is the right person, None where no ground truth is known.
    """

    image: Image
    name: str
    box: Float[np.ndarray, "4"]
    similarity: float
    match: bool | None = None


def picture_row(
    title: str, image: Image, name: str, box: Float[np.ndarray, "4"], results: Iterable[Result]
) -> list[Image]:
    """The cells of a query, in a photo of that name, and of its `RESULTS_SHOWN` first results.

    A cell shows the person enlarged, and the photo with the person's box: yellow for the query,
    green or red for a right or wrong result, blue where that is not known. Of a generator of
    results only those that are shown are made.
    """
    cells = [_cell(image, box, YELLOW, "", title, name)]
    for rank, one in enumerate(islice(results, RESULTS_SHOWN), start=1):
        # In words as well, for those who cannot tell red from green.
        color, word = {None: (BLUE, ""), True: (GREEN, "right"), False: (RED, "wrong")}[one.match]
        caption = f"#{rank}  similarity {one.similarity:.2f}"
        cells.append(_cell(one.image, one.box, color, word, caption, one.name))
    nobody = np.full((1, 1, 3), 255, np.uint8)
    return cells if len(cells) > 1 else [*cells, captioned(nobody, "no detection")]


def _cell(
    image: Image, box: Float[np.ndarray, "4"], color: Color, word: str, *caption: str
) -> Image:
    scene, factor = fitted(image, _SCENE_WIDTH, SCENE_HEIGHT)
    draw_box(scene, np.asarray(box) * factor, color, 2)
    width = max(MIN_WIDTH, scene.shape[1])
    start, end = np.split(np.asarray(box), 2)
    context = 0.1 * (end - start)  # is shown around the person
    left, top, right, bottom = _clipped(image, np.concatenate([start - context, end + context]))
    person, _ = fitted(image[top : bottom + 1, left : right + 1], width, _PERSON_HEIGHT)
    cv2.rectangle(person, (1, 1), (person.shape[1] - 2, person.shape[0] - 2), color, 3)
    if word:
        corner = np.array([0.0, person.shape[0]] * 2)
        draw_label(person, corner, word, color, _CAPTION_SCALE)
    person = _on_white(person, _PERSON_HEIGHT + GAP // 2, width)
    return captioned(np.concatenate([person, _on_white(scene, SCENE_HEIGHT, width)]), *caption)
