"""Search results in the manner of Paper, Fig. 7."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice

import cv2
import numpy as np
from jaxtyping import Float

from alignps_jax.drawing.canvas import (
    BLACK,
    BLUE,
    CAPTION_SCALE,
    GAP,
    GREEN,
    LINE_HEIGHT,
    RED,
    YELLOW,
    Color,
    captioned,
    clipped,
    draw_box,
    draw_label,
    fitted,
    grid_picture,
    put_text,
)
from alignps_jax.media.photos import Image

# Results of a query in a row: more would make each too small to see who it is.
RESULTS_SHOWN = 5
# Layout of the picture, in pixels.
_SCENE_HEIGHT = 170
_SCENE_WIDTH = 340  # a wider scene (panorama) is scaled down to this
_CROP_HEIGHT = 280
_CELL_WIDTH = 200  # a narrower panel gets a margin, so that its caption can be read
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
class Result:
    """A person that was found: the photo with its name, the box in it, and how similar it is.

    `match` says whether it is the right person, None where no ground truth is known.
    """

    image: Image
    name: str
    box: Float[np.ndarray, "4"]
    similarity: float
    match: bool | None = None


@dataclasses.dataclass(frozen=True)
class PictureRow:
    """A query and its first results, most similar first."""

    query: Panel
    results: tuple[Panel, ...]


def picture_row(
    title: str,
    image: Image,
    name: str,
    box: Float[np.ndarray, "4"],
    results: Iterable[Result],
) -> PictureRow:
    """The row of a query and its first `RESULTS_SHOWN` results, captions included.

    Args:
      title: stands above the query, over the name of its photo.
      image: the query photo.
      name: of that photo.
      box: the query in it.
      results: most similar first; of a generator only those that are shown are made.
    """
    panels = (
        Panel(
            one.image, one.box, f"#{rank}  similarity {one.similarity:.2f}\n{one.name}", one.match
        )
        for rank, one in enumerate(islice(results, RESULTS_SHOWN), start=1)
    )
    return PictureRow(Panel(image, box, f"{title}\n{name}"), tuple(panels))


def ranking_picture(rows: Iterable[PictureRow]) -> Image:
    """A grid with a row per query: the query, then its results.

    A panel shows the caption, the person enlarged, and the scene with the person's box. Boxes
    are yellow for the query, green or red for a right or wrong result, blue where that is not
    known. Rows may come from a generator: only their reduced panels are kept.
    """
    return grid_picture([_row_cells(row) for row in rows])


def _row_cells(row: PictureRow) -> list[Image]:
    """The row's panels, drawn at their final size; all are equally high."""
    panels = [row.query, *row.results]
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
    left, top, right, bottom = clipped(np.array([x1, y1, x2, y2]) + context, width, height)
    crop, _ = fitted(panel.image[top : bottom + 1, left : right + 1], max_width, _CROP_HEIGHT)
    cv2.rectangle(crop, (1, 1), (crop.shape[1] - 2, crop.shape[0] - 2), color, 3)
    if panel.match is not None:
        # In words as well, for those who cannot tell red from green.
        word = "right" if panel.match else "wrong"
        corner = np.array([0.0, crop.shape[0], 0.0, crop.shape[0]])
        draw_label(crop, corner, word, color, CAPTION_SCALE)
    return crop
