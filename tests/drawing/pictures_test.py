"""Pictures, judged by their pixels."""

import numpy as np
import pytest

from alignps_jax.drawing.pictures import (
    BLUE,
    GAP,
    GREEN,
    RED,
    RESULTS_SHOWN,
    SCENE_HEIGHT,
    YELLOW,
    Result,
    captioned,
    draw_detections,
    grid_picture,
    picture_row,
    shortened,
)


def gray(height, width, value=90):
    return np.full((height, width, 3), value, np.uint8)


def has(image, color):
    """Pixels of exactly this color."""
    return (image == np.array(color, np.uint8)).all(-1)


def extent(mask):
    """x1, y1, x2, y2 of the marked pixels, both ends included."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


BOX, PHOTO = np.array([40.0, 30, 80, 130]), gray(240, 320)


def row(*results, image=PHOTO, box=BOX):
    return picture_row("query", image, "q.jpg", box, results)


def result(match=None, image=PHOTO, box=BOX, name="x.jpg"):
    return Result(image, name, box, 0.5, match)


@pytest.mark.parametrize(
    ("height", "width", "line", "label"),
    [(240, 320, 1, 10), (1920, 1080, 4, 20), (2400, 4000, 8, 40)],
)
def test_boxes_are_drawn_where_they_are_and_grow_with_the_photo(height, width, line, label):
    image = gray(height, width)
    box = np.array([[width * 0.25, height * 0.4, width * 0.75, height * 0.9]], np.float32)
    mask = has(draw_detections(image, box, np.array([0.873])), GREEN)
    assert (image == 90).all()  # the photo itself stays as it is
    middle, x1, y1 = int(height * 0.6), *box[0, :2].astype(int)
    np.testing.assert_allclose(extent(mask)[2:], box[0, 2:], atol=line)
    assert np.flatnonzero(mask[middle]).min() == pytest.approx(x1, abs=line)
    assert line <= mask[middle, : width // 2].sum() <= line + 1
    assert not mask[middle : int(height * 0.85), int(width * 0.3) : int(width * 0.7)].any()
    # A label above the left corner, with letters in it.
    assert label <= y1 - extent(mask)[1] <= 2.5 * label
    assert 0.25 < mask[y1 - label : y1 - line, x1 : x1 + 2 * label].mean() < 1


@pytest.mark.parametrize(
    ("box", "sides"),
    [
        ((-50, -20, 5000, 900), (0, 0, 319, 239)),
        ((305, 0, 319, 60), (290, 0, 319, 60)),  # the label begins beside the narrow box
        ((10, 100, 10, 100), (10, 80, 50, 100)),
        ((200, 200, 150, 150), (200, 180, 240, 200)),
        ((900, 900, 920, 920), (280, 220, 319, 239)),
    ],
)
def test_boxes_and_labels_stay_within_the_image(box, sides):
    mask = has(draw_detections(gray(240, 320)[:, ::-1], np.array([box], float), np.ones(1)), GREEN)
    np.testing.assert_allclose(extent(mask), sides, atol=12)
    if sides[2:] == (319, 239) and not sides[0]:  # all four lines are seen
        assert min(mask[-1, 60:].all(), mask[60:, -1].all(), mask[60:, 0].all(), mask[0, 60:].all())


def test_the_most_confident_detection_is_on_top():
    boxes = np.array([[100.0, 100, 150, 180], [101, 101, 151, 181]])
    one = draw_detections(gray(240, 320), boxes[:1], np.array([0.9]))
    both = draw_detections(gray(240, 320), boxes, np.array([0.9, 0.1]))
    swapped = draw_detections(gray(240, 320), boxes[::-1], np.array([0.1, 0.9]))
    np.testing.assert_array_equal(both, swapped)
    np.testing.assert_array_equal(both[85:99, 100:120], one[85:99, 100:120])
    nobody = draw_detections(gray(240, 320), np.zeros((0, 4)), np.zeros(0))
    np.testing.assert_array_equal(nobody, gray(240, 320))


def test_colors_tell_query_right_wrong_and_unknown():
    far = np.array([500.0, 500, 600, 600])  # as good as any
    cells = row(result(True, box=far), result(False), result(None), box=-far)
    colors = (YELLOW, GREEN, RED, BLUE)
    counts = np.array([[has(cell, color).sum() for color in colors] for cell in cells])
    assert ((counts > 0) == np.eye(4, dtype=bool)).all()
    assert min(counts[1, 1], counts[2, 2]) > counts[3, 3] + 300  # also in words, on a label


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_row_shows_the_first_results_and_makes_no_others(count):
    made = []
    results = (made.append(number) or result() for number in range(count))
    cells = picture_row("a title", gray(7, 8), "query.jpg", np.zeros(4), results)
    assert made == list(range(min(count, RESULTS_SHOWN)))
    assert len(cells) == 1 + max(1, len(made))
    assert (cells[1] < 100).any()  # what was found, or that nobody was
    assert has(cells[1], BLUE).any() == bool(count)


def test_rows_differ_in_length_and_cells_in_size():
    grid = [[gray(50, 30), gray(20, 80)], [gray(10, 10)]]
    picture = grid_picture(cells for cells in grid)
    assert picture.shape == (50 + 10 + 4 * GAP + 1, 2 * (80 + GAP) + GAP, 3)
    mask = has(picture, (90, 90, 90))
    assert extent(mask[: 50 + GAP]) == (GAP, GAP, GAP + 80 + GAP + 79, GAP + 49)
    assert extent(mask[50 + 2 * GAP :])[2] == GAP + 9
    assert mask.sum() == 50 * 30 + 20 * 80 + 10 * 10
    assert (picture == 200)[:, GAP:].all((1, 2)).sum() == 1  # the line between the rows


@pytest.mark.parametrize(("height", "width"), [(540, 960), (900, 300), (100, 1600)])
def test_a_cell_has_the_person_enlarged_and_the_box_in_the_scene(height, width):
    box = np.array([0.6, 0.5, 0.7, 0.75]) * (width, height, width, height)
    image, (x1, y1, x2, y2) = gray(height, width), box.astype(int)
    image[y1:y2, x1:x2] = (10, 20, 200)
    cell = row(image=image, box=box)[0]
    factor = min(SCENE_HEIGHT / height, 340 / width)
    mask = has(cell[-SCENE_HEIGHT:], YELLOW)
    np.testing.assert_allclose(extent(mask), box * factor, atol=2)
    left, top, right, bottom = extent(has(cell[:-SCENE_HEIGHT], (10, 20, 200)))
    assert max((right - left) / 200, (bottom - top) / 280) > 0.7
    shape = (x2 - x1) / (y2 - y1)
    assert (right - left) / (bottom - top) == pytest.approx(shape, rel=0.15)  # not distorted


def test_captions():
    name = "folder/" * 30 + "image-0001.jpg"
    assert row(result(name="x"))[1].shape == row(result(name=name))[1].shape
    assert shortened("abc", 200) == "abc"
    head, tail = shortened(name, 200).split("...")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    assert 10 < len(head) < 30
    # OpenCV ends the process on halves of surrogate pairs.
    strip = captioned(gray(10, 30), "a\udcff\ud800b.jpg", "second")
    np.testing.assert_array_equal(strip, captioned(gray(10, 30), "a??b.jpg", "second"))
    assert strip.shape[1] == 200  # a caption has room
    assert (captioned(gray(10, 30), "人") != captioned(gray(10, 30), "大")).any()  # letters, no "?"
