"""Pictures, judged by their pixels."""

import numpy as np
import pytest

from alignps_jax.drawing.pictures import (
    BLUE,
    GAP,
    GREEN,
    LINE_HEIGHT,
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


BOX = np.array([40.0, 30, 80, 130])
PHOTO = gray(240, 320)


def row(*results, image=PHOTO, box=BOX):
    return picture_row("query", image, "q.jpg", box, results)


def result(match=None, image=PHOTO, box=BOX, name="x.jpg"):
    return Result(image, name, box, 0.5, match)


# Detections.


@pytest.mark.parametrize(("height", "width"), [(240, 320), (1080, 1920), (2400, 1200)])
def test_boxes_are_drawn_where_they_are(height, width):
    image = gray(height, width)
    box = np.array([[width * 0.25, height * 0.4, width * 0.75, height * 0.9]], np.float32)
    drawn = draw_detections(image, box, np.array([0.873]))
    assert (image == 90).all()  # the photo itself stays as it is
    mask = has(drawn, GREEN)
    below_label = int(height * 0.5)
    x1, _, x2, y2 = extent(np.where(np.arange(height)[:, None] >= below_label, mask, False))
    slack = max(2, min(height, width) // 300)
    np.testing.assert_allclose([x1, x2, y2], box[0, [0, 2, 3]], atol=slack)
    # Nothing within the box, but a label above its left corner.
    assert not mask[below_label : int(height * 0.85), int(width * 0.3) : int(width * 0.7)].any()
    x1, y1 = box[0, :2].astype(int)
    assert mask[y1 - 10 : y1 - slack, x1 : x1 + 20].mean() > 0.25


def test_lines_and_labels_grow_with_the_image():
    def label_height_and_line(scale):
        box = scale * np.array([[100.0, 100, 200, 200]])
        mask = has(draw_detections(gray(240 * scale, 320 * scale), box, np.array([0.5])), GREEN)
        return 100 * scale - extent(mask)[1], mask[150 * scale, : 150 * scale].sum()

    small, large = label_height_and_line(1), label_height_and_line(6)
    assert small[0] >= 10
    assert small[1] == 1
    assert 2 * small[0] < large[0] < 100
    assert large[1] >= 4


def test_boxes_and_labels_stay_within_the_image():
    mask = has(draw_detections(gray(240, 320), np.array([[305.0, 0, 319, 60]]), np.ones(1)), GREEN)
    x1, y1, x2, _ = extent(mask)
    assert x1 < 303  # the label reaches beyond the narrow box, to the left
    assert (y1, x2) == (0, 319)
    box = np.array([[-50.0, -20, 5000, 900]])
    mask = has(draw_detections(gray(600, 800), box, np.array([0.5])), GREEN)
    for side in (mask[-1, 100:-2], mask[100:-2, -1], mask[100:-2, 0], mask[0, 200:-2]):
        assert side.all()


def test_no_detections_and_odd_boxes():
    image = gray(50, 60)
    np.testing.assert_array_equal(draw_detections(image, np.zeros((0, 4)), np.zeros(0)), image)
    odd = np.array([[10.0, 10, 10, 10], [20, 20, 5, 5], [100, 100, 120, 120]])
    assert has(draw_detections(image[:, ::-1], odd, np.ones(3)), GREEN).any()


def test_the_most_confident_detection_is_on_top():
    boxes = np.array([[100.0, 100, 150, 180], [101, 101, 151, 181]])
    one = draw_detections(gray(240, 320), boxes[:1], np.array([0.9]))
    both = draw_detections(gray(240, 320), boxes, np.array([0.9, 0.1]))
    swapped = draw_detections(gray(240, 320), boxes[::-1], np.array([0.1, 0.9]))
    np.testing.assert_array_equal(both, swapped)
    np.testing.assert_array_equal(both[85:99, 100:120], one[85:99, 100:120])


# The search picture.


def test_colors_tell_query_right_wrong_and_unknown():
    cells = row(result(True), result(False), result(None))
    for number, cell in enumerate(cells):
        found = [has(cell, color).any() for color in (YELLOW, GREEN, RED, BLUE)]
        assert found == [place == number for place in range(4)]
    # Right and wrong also in words, below a label.
    right, wrong, unknown = (
        has(cell, color).sum() for cell, color in zip(cells[1:], (GREEN, RED, BLUE), strict=True)
    )
    assert min(right, wrong) > unknown + 300


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_row_shows_the_first_results_and_makes_no_others(count):
    made = []

    def results():
        for number in range(count):
            made.append(number)
            yield result()

    cells = picture_row("a title", gray(7, 8), "query.jpg", np.zeros(4), results())
    assert made == list(range(min(count, RESULTS_SHOWN)))
    assert len(cells) == 1 + max(1, len(made))
    if not count:  # says so
        assert (cells[1] < 100).any()
    assert has(cells[1], BLUE).any() == bool(count)


def test_rows_differ_in_length_and_cells_in_size():
    grid = [[gray(50, 30), gray(20, 80)], [gray(10, 10)]]
    picture = grid_picture(cells for cells in grid)
    assert picture.shape == (50 + 10 + 4 * GAP + 1, 2 * (80 + GAP) + GAP, 3)
    mask = has(picture, (90, 90, 90))
    assert extent(mask[: 50 + GAP]) == (GAP, GAP, GAP + 80 + GAP + 79, GAP + 49)
    assert extent(mask[50 + 2 * GAP :])[2] == GAP + 9
    assert mask.sum() == 50 * 30 + 20 * 80 + 10 * 10
    line = (picture == 200).all(-1)
    assert line.all(1).sum() == 0
    assert line[:, GAP:].all(1).sum() == 1


def test_a_small_person_is_shown_enlarged_and_not_distorted():
    image = gray(1080, 1920)
    image[500:560, 900:920] = (10, 20, 200)  # 20 x 60 pixels of 1920 x 1080
    cells = row(result(True, image, np.array([900.0, 500, 920, 560])))
    x1, y1, x2, y2 = extent(has(cells[1], (10, 20, 200)))
    assert y2 - y1 > 180
    assert 0.25 < (x2 - x1) / (y2 - y1) < 0.42  # 20 : 60


@pytest.mark.parametrize(("height", "width"), [(540, 960), (900, 300), (100, 1600)])
def test_the_scene_box_is_at_the_scaled_place(height, width):
    box = np.array([0.6, 0.5, 0.7, 0.75]) * (width, height, width, height)
    scene = row(image=gray(height, width), box=box)[0][-SCENE_HEIGHT:]
    factor = min(SCENE_HEIGHT / height, 340 / width)
    np.testing.assert_allclose(extent(has(scene, YELLOW)), box * factor, atol=2)


@pytest.mark.parametrize(
    "box", [(-30, -30, 5, 5), (310, 230, 400, 300), (500, 500, 600, 600), (50, 50, 50, 50)]
)
def test_boxes_at_and_beyond_the_border(box):
    assert has(row(result(True, box=np.array(box, float)))[1], GREEN).any()


def test_long_captions_are_cut_in_the_middle():
    name = "folder/" * 30 + "image-0001.jpg"
    assert row(result(name="x"))[1].shape == row(result(name=name))[1].shape
    assert shortened("abc", 200) == "abc"
    head, tail = shortened(name, 200).split("...")
    assert 10 < len(head) < 30
    assert abs(len(head) - len(tail)) <= 1
    assert name.startswith(head)
    assert name.endswith(tail)
    cell = captioned(gray(10, 200), name)
    assert (cell[:LINE_HEIGHT, 100:].min(axis=(0, 2)) < 255).sum() > 40  # letters up to its end


def test_captions_of_names_in_all_scripts():
    # OpenCV ends the process on halves of surrogate pairs.
    strip = captioned(gray(10, 300), "a\udcff\ud800b.jpg", "second")
    np.testing.assert_array_equal(strip, captioned(gray(10, 300), "a??b.jpg", "second"))
    chinese, other = captioned(gray(10, 300), "人"), captioned(gray(10, 300), "大")
    assert (chinese != other).any()  # letters, not twice the sign for a missing one
    assert captioned(gray(10, 30), "a").shape[1] == 200  # a caption has room
