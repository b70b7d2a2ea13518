"""Pictures, judged by their pixels."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image as PILImage

from alignps_jax.drawing import canvas as visualize
from alignps_jax.drawing.rankings import (
    _SCENE_HEIGHT,
    RESULTS_SHOWN,
    Panel,
    PictureRow,
    Result,
    picture_row,
    ranking_picture,
)
from alignps_jax.files import write_image
from alignps_jax.media.photos import read_photo
from alignps_jax.types import UserError
from tests.places import SHARED

MAX_PIXELS = 2 * 10**7

PHOTOS = SHARED / "photos"


def gray(height, width, value=90):
    return np.full((height, width, 3), value, np.uint8)


def has(image, color):
    """Pixels of exactly this color."""
    return (image == np.array(color, np.uint8)).all(-1)


def extent(mask):
    """x1, y1, x2, y2 of the marked pixels, both ends included."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


def panel(match=None, height=240, width=320, box=(40, 30, 80, 130), caption="x.jpg", value=90):
    return Panel(gray(height, width, value), np.array(box, float), caption, match)


# Detections.


@pytest.mark.parametrize(("height", "width"), [(240, 320), (1080, 1920), (2400, 1200)])
def test_boxes_are_drawn_where_they_are(height, width):
    image = gray(height, width)
    box = np.array([[width * 0.25, height * 0.4, width * 0.75, height * 0.9]], np.float32)
    drawn = visualize.draw_detections(image, box, np.array([0.873]))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 90).all()  # the photo itself stays as it is
    mask = has(drawn, visualize.GREEN)
    below_label = int(height * 0.5)
    x1, _, x2, y2 = extent(np.where(np.arange(height)[:, None] >= below_label, mask, False))
    slack = max(2, min(height, width) // 300)
    np.testing.assert_allclose([x1, x2, y2], box[0, [0, 2, 3]], atol=slack)
    # Nothing within the box, but a label above its left corner.
    assert not mask[below_label : int(height * 0.85), int(width * 0.3) : int(width * 0.7)].any()
    x1, y1 = box[0, :2].astype(int)
    assert mask[y1 - 10 : y1 - slack, x1 : x1 + 20].mean() > 0.25
    changed = (drawn != image).any(-1)
    assert changed[: int(box[0, 1])].sum() < 0.01 * height * width


def test_lines_and_labels_grow_with_the_image():
    def label_height_and_line(scale):
        drawn = visualize.draw_detections(
            gray(240 * scale, 320 * scale),
            scale * np.array([[100.0, 100, 200, 200]]),
            np.array([0.5]),
        )
        mask = has(drawn, visualize.GREEN)
        left_line = mask[150 * scale, : 150 * scale].sum()
        return 100 * scale - extent(mask)[1], left_line

    small, large = label_height_and_line(1), label_height_and_line(6)
    assert small[0] >= 10
    assert small[1] == 1
    assert 2 * small[0] < large[0] < 100
    assert large[1] >= 4


def test_label_stays_within_the_image():
    box = np.array([[305.0, 0, 319, 60]])
    drawn = visualize.draw_detections(gray(240, 320), box, np.array([0.5]))
    x1, y1, x2, _ = extent(has(drawn, visualize.GREEN))
    assert x1 < 303  # the label reaches beyond the narrow box, to the left
    assert (y1, x2) == (0, 319)


def test_boxes_beyond_the_image_keep_their_four_sides():
    box = np.array([[-50.0, -20, 5000, 900]])
    mask = has(visualize.draw_detections(gray(600, 800), box, np.array([0.5])), visualize.GREEN)
    assert mask[-1, 100:-2].all()
    assert mask[100:-2, -1].all()
    assert mask[100:-2, 0].all()
    assert mask[0, 200:-2].all()


def test_no_detections_and_odd_boxes():
    image = gray(50, 60)
    none = visualize.draw_detections(image, np.zeros((0, 4)), np.zeros(0))
    np.testing.assert_array_equal(none, image)
    odd = np.array([[10.0, 10, 10, 10], [20, 20, 5, 5], [100, 100, 120, 120]])
    drawn = visualize.draw_detections(image[:, ::-1], odd, np.ones(3))
    assert has(drawn, visualize.GREEN).any()


def test_the_most_confident_detection_is_on_top():
    boxes = np.array([[100.0, 100, 150, 180], [101, 101, 151, 181]])
    one = visualize.draw_detections(gray(240, 320), boxes[:1], np.array([0.9]))
    both = visualize.draw_detections(gray(240, 320), boxes, np.array([0.9, 0.1]))
    swapped = visualize.draw_detections(gray(240, 320), boxes[::-1], np.array([0.1, 0.9]))
    np.testing.assert_array_equal(both, swapped)
    np.testing.assert_array_equal(both[85:99, 100:120], one[85:99, 100:120])


# The search picture.


def test_colors_tell_query_right_wrong_and_unknown():
    row = PictureRow(panel(), (panel(True), panel(False), panel(None)))
    picture = ranking_picture([row])
    colors = (visualize.YELLOW, visualize.GREEN, visualize.RED, visualize.BLUE)
    lefts = [extent(has(picture, color))[0] for color in colors]
    rights = [extent(has(picture, color))[2] for color in colors]
    assert all(right < left for right, left in zip(rights, lefts[1:], strict=False))


def test_all_queries_are_yellow_whatever_their_match():
    picture = ranking_picture([PictureRow(panel(False), ())])
    assert has(picture, visualize.YELLOW).any()
    assert not has(picture, visualize.RED).any()


def test_grid_has_a_row_per_query_and_a_column_per_result():
    def size(rows, results):
        row = PictureRow(panel(), (panel(True),) * results)
        return np.array(ranking_picture([row] * rows).shape[:2])

    one = size(1, 1)
    assert size(3, 1)[0] - size(2, 1)[0] == size(2, 1)[0] - one[0] > 300
    assert size(1, 3)[1] - size(1, 2)[1] == size(1, 2)[1] - one[1] > 200
    assert size(1, RESULTS_SHOWN)[1] < 2000


def test_rows_may_differ_in_length_and_come_from_a_generator():
    rows = [
        PictureRow(panel(), (panel(True),) * 3),
        PictureRow(panel(height=900, width=300), ()),
        PictureRow(panel(height=100, width=1600), (panel(False, height=20, width=20),)),
    ]
    picture = ranking_picture(row for row in rows)
    np.testing.assert_array_equal(picture, ranking_picture(rows))
    assert has(picture, visualize.GREEN).any()
    assert has(picture, visualize.RED).any()


def test_a_query_without_results_says_so():
    without = ranking_picture([PictureRow(panel(), ())])
    x2 = extent(has(without, visualize.YELLOW))[2]
    assert (without[:40, x2 + 20 :] < 100).any()  # dark letters beside the query


def test_no_rows():
    picture = ranking_picture([])
    assert picture.size > 0
    assert (picture == 255).all()


def test_a_small_person_is_shown_enlarged():
    image = gray(1080, 1920)
    image[500:560, 900:920] = (10, 20, 200)  # 20 x 60 pixels of 1920 x 1080
    result = Panel(image, np.array([900.0, 500, 920, 560]), "x.jpg", True)
    picture = ranking_picture([PictureRow(panel(), (result,))])
    x1, y1, x2, y2 = extent(has(picture, (10, 20, 200)))
    assert y2 - y1 > 180
    assert 0.25 < (x2 - x1) / (y2 - y1) < 0.42  # 20 : 60, not distorted


def test_the_scene_box_is_at_the_scaled_place():
    box = (600, 270, 660, 405)
    query = panel(box=box, height=540, width=960)
    picture = ranking_picture([PictureRow(query, ())])
    scene = picture[-_SCENE_HEIGHT - visualize.GAP :]
    mask = has(scene, visualize.YELLOW)
    factor = _SCENE_HEIGHT / 540
    expected = np.array(box) * factor + [visualize.GAP, 0, visualize.GAP, 0]
    np.testing.assert_allclose(extent(mask), expected, atol=2)


@pytest.mark.parametrize(
    "box", [(-30, -30, 5, 5), (310, 230, 400, 300), (500, 500, 600, 600), (50, 50, 50, 50)]
)
def test_boxes_at_and_beyond_the_border(box):
    picture = ranking_picture([PictureRow(panel(box=box), (panel(True, box=box),))])
    assert has(picture, visualize.GREEN).any()


def test_long_captions_do_not_widen_the_picture():
    name = "folder/" * 30 + "image-0001.jpg"
    short = ranking_picture([PictureRow(panel(), (panel(caption="#1\nx"),))])
    long = ranking_picture([PictureRow(panel(), (panel(caption=f"#1\n{name}"),))])
    assert short.shape == long.shape
    assert (long[:, -visualize.GAP :] == 255).all()
    assert visualize.shortened("abc", 200) == "abc"
    shortened = visualize.shortened(name, 200)
    head, tail = shortened.split("...")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    assert visualize.text_size(shortened, visualize.CAPTION_SCALE)[0] <= 200


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_row_shows_the_first_results_and_makes_no_others(count):
    made = []

    def results():
        for number in range(count):
            made.append(number)
            box = np.full(4, float(number))
            yield Result(gray(5, 6), f"{number}.jpg", box, np.float32(0.876), number % 2 == 0)

    row = picture_row("a title", gray(7, 8), "query.jpg", np.zeros(4), results())
    assert row.query.caption == "a title\nquery.jpg"
    assert row.query.image.shape == (7, 8, 3)
    assert made == list(range(min(count, RESULTS_SHOWN)))
    for number, panel in enumerate(row.results):
        assert panel.caption == f"#{number + 1}  similarity 0.88\n{number}.jpg"
        assert (panel.box[0], panel.match) == (number, number % 2 == 0)


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs ../shared")
def test_real_photos():
    query = read_photo(PHOTOS / "query.jpg", MAX_PIXELS)
    gallery = read_photo(PHOTOS / "gallery-1.jpg", MAX_PIXELS)
    row = PictureRow(
        Panel(query, np.array([60.0, 80, 400, 920]), "query"),
        (Panel(gallery, np.array([1020.0, 300, 1290, 1000]), "#1"),),
    )
    picture = ranking_picture([row])
    assert has(picture, visualize.BLUE).any()
    assert not has(picture, visualize.GREEN).any()


# Files.


def photo(seed=0, height=40, width=60):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return cv2.resize(noise, (width, height))


def encoded(image, file_format="jpeg", **options):
    data = io.BytesIO()
    PILImage.fromarray(image).save(data, file_format, **options)
    return data.getvalue()


def test_png_round_trip_and_jpeg_colors(tmp_path):
    image = photo()
    write_image(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(read_photo(tmp_path / "new" / "a.png", MAX_PIXELS), image)
    red = np.full((32, 32, 3), (200, 30, 10), np.uint8)
    for name in ("a.jpg", "a.JPEG"):
        write_image(tmp_path / name, red)
        np.testing.assert_allclose(read_photo(tmp_path / name, MAX_PIXELS), red, atol=3)
        assert (tmp_path / name).read_bytes()[:2] == b"\xff\xd8"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["a.gif", "a", "file/a.png", "folder.png"])
def test_unwritable_pictures(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=name):
        write_image(tmp_path / name, photo())


def test_a_picture_too_large_for_jpeg_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="70000"):
        write_image(tmp_path / "a.jpg", gray(70000, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, file_format, orientation):
    upright = photo(3, 64, 96)
    # What a camera held in another way stores: the inverse of what the viewer is to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), file_format, exif=exif, quality=95)
    (tmp_path / "a").write_bytes(data)
    image = read_photo(tmp_path / "a", MAX_PIXELS)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode):
    image = PILImage.fromarray(photo()).convert(mode)
    image.save(tmp_path / "a", "jpeg" if mode == "CMYK" else "png")
    read = read_photo(tmp_path / "a", MAX_PIXELS)
    assert read.shape == (40, 60, 3)
    assert read.dtype == np.uint8


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [10, 500, 0.5])
def test_truncated_jpeg(tmp_path, missing, progressive):
    data = encoded(photo(1, 400, 600), progressive=progressive)
    kept = len(data) - (missing if missing >= 1 else int(missing * len(data)))
    (tmp_path / "a.jpg").write_bytes(data[:kept])
    with pytest.raises(UserError, match=r"a\.jpg.*truncated"):
        read_photo(tmp_path / "a.jpg", MAX_PIXELS)


def test_truncated_jpeg_with_a_whole_thumbnail(tmp_path):
    data, thumbnail = encoded(photo(1, 400, 600)), encoded(photo(2))
    assert thumbnail.endswith(b"\xff\xd9")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = data[:2] + segment + data[2:]
    (tmp_path / "a.jpg").write_bytes(with_thumbnail)
    assert read_photo(tmp_path / "a.jpg", MAX_PIXELS).shape == (400, 600, 3)
    (tmp_path / "a.jpg").write_bytes(with_thumbnail[:-100])
    with pytest.raises(UserError, match="truncated"):
        read_photo(tmp_path / "a.jpg", MAX_PIXELS)


def test_bytes_after_the_end_of_a_jpeg_do_not_matter(tmp_path):
    data = encoded(photo(1, 400, 600))
    (tmp_path / "a.jpg").write_bytes(data + b"camera\xff\xd8 notes \xff" * 10)
    (tmp_path / "b.jpg").write_bytes(data)
    appended, plain = (read_photo(tmp_path / name, MAX_PIXELS) for name in ("a.jpg", "b.jpg"))
    np.testing.assert_array_equal(appended, plain)


@pytest.mark.parametrize("file_format", ["png", "webp", "bmp", "tiff"])
def test_other_truncated_formats(tmp_path, file_format):
    data = encoded(photo(1, 400, 600), file_format)
    (tmp_path / "a").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="a: "):
        read_photo(tmp_path / "a", MAX_PIXELS)


@pytest.mark.parametrize("content", [b"", b"hello, I am not an image" * 20, b"\xff", b"\xff\xd8"])
def test_what_is_not_an_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg") as error:
        read_photo(tmp_path / "a.jpg", MAX_PIXELS)
    assert "\n" not in str(error.value)


def test_missing_image_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*a\.jpg"):
        read_photo(tmp_path / "a.jpg", MAX_PIXELS)
    with pytest.raises(UserError, match="no regular file"):
        read_photo(tmp_path, MAX_PIXELS)


def test_names_that_are_no_text_are_drawn():
    # OpenCV ends the process on halves of surrogate pairs.
    strip = visualize.captioned(gray(10, 200), "a\udcff\ud800b.jpg\nsecond", 2)
    np.testing.assert_array_equal(strip, visualize.captioned(gray(10, 200), "a??b.jpg\nsecond", 2))
