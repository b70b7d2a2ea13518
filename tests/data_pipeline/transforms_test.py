"""Pixels and boxes against slow, literal code."""

import math

import cv2
import numpy as np
import pytest

from alignps_jax.types import Annotations, UserError
from data_pipeline import transforms
from tests.places import SHARED

PAPER_SCALES = ((667, 400), (1000, 600), (1333, 800), (1500, 900), (1666, 1000), (2000, 1200))
FRAMES = SHARED / "prw_sample" / "frames"


def random_image(seed, height, width):
    """A smooth random RGB image (JPEG keeps it, and interpolation is visible)."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image):
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]))
    assert ok
    return data.tobytes()


def bilinear(image, height, width):
    """Half-pixel-center bilinear resampling, pixel by pixel, edges repeated."""
    out = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            y = (row + 0.5) * image.shape[0] / height - 0.5
            x = (column + 0.5) * image.shape[1] / width - 0.5
            y0, x0 = math.floor(y), math.floor(x)
            for yy, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                for xx, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                    inside_y = min(max(yy, 0), image.shape[0] - 1)
                    inside_x = min(max(xx, 0), image.shape[1] - 1)
                    out[row, column] += wy * wx * image[inside_y, inside_x]
    return out


def filled(image, size, flip, *boxes):
    """A batch of one row with this image and boxes, in memory that held something else."""
    batch = transforms.empty_batch(1, (64, 96) if max(size) < 97 else (928, 1504), 56)
    batch.image[:] = 7
    count = len(boxes)
    people = Annotations(
        names=("a",),
        boxes=(np.array(boxes, np.float32).reshape(-1, 4),),
        identity=(np.arange(count, dtype=np.int32),),
        labeled=(np.arange(count) % 2 == 0,),
        camera=np.zeros(1, np.int32),
    )
    transforms.fill_image(batch, 0, image, size, flip)
    transforms.fill_people(batch, 0, people, 0, size, flip)
    return batch


class TestDecode:
    def test_is_rgb_as_the_plain_bgr_road(self):
        jpeg = encode(random_image(0, 37, 53))
        expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(transforms.decode_jpeg(jpeg, "a"), expected)

    @pytest.mark.parametrize("jpeg", [b"", b"no image", encode(random_image(3, 64, 64))[:400]])
    def test_broken_bytes_name_the_image(self, jpeg):
        with pytest.raises(UserError, match=r"s00042\.jpg.*decoded") as error:
            transforms.decode_jpeg(jpeg, "s00042.jpg")
        assert "\n" not in str(error.value)


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "scale", "expected"),
        [
            ((1080, 1920), (1500, 900), (844, 1500)),
            ((1920, 1080), (1500, 900), (1500, 844)),
            ((600, 800), (1500, 900), (900, 1200)),  # the short side limits
            ((900, 1500), (1500, 900), (900, 1500)),
            ((240, 320), (667, 400), (400, 533)),
            ((500, 500), (1500, 900), (900, 900)),
            ((1, 4000), (1500, 900), (1, 1500)),  # never below a pixel
        ],
    )
    def test_known_values(self, size, scale, expected):
        assert transforms.rescaled_size(size, scale) == expected

    def test_fits_its_scale_and_keeps_the_ratio(self):
        rng = np.random.default_rng(0)
        for height, width in rng.integers(32, 3000, (300, 2)).tolist():
            for long, short in PAPER_SCALES:
                new_height, new_width = transforms.rescaled_size((height, width), (long, short))
                assert max(new_height, new_width) <= long
                assert min(new_height, new_width) <= short
                # One limit is reached, and neither side is more than half a pixel off the ratio.
                reached = max(new_height, new_width) == long, min(new_height, new_width) == short
                assert any(reached)
                factor = min(long / max(height, width), short / min(height, width))
                assert abs(new_height - height * factor) <= 0.5 + 1e-9
                assert abs(new_width - width * factor) <= 0.5 + 1e-9

    def test_a_square_counts_as_portrait(self):
        shapes = [(10, 11), (11, 10), (10, 10)]
        assert [transforms.is_landscape(shape) for shape in shapes] == [True, False, False]


class TestBuckets:
    def test_two_per_scale_smallest_first(self):
        assert transforms.buckets(((1500, 900), (667, 400))) == (
            (416, 672),
            (672, 416),
            (928, 1504),
            (1504, 928),
        )

    def test_no_repeats(self):
        assert transforms.buckets(((640, 640), (639, 630))) == ((640, 640),)
        assert len(transforms.buckets(PAPER_SCALES)) == 12


class TestFilling:
    @pytest.mark.parametrize("size", [(23, 31), (60, 90), (40, 64), (1, 7)])
    @pytest.mark.parametrize("flip", [False, True])
    def test_pixels_against_literal_bilinear(self, size, flip):
        image = random_image(4, 40, 64)
        slot = filled(image, size, flip).image[0]
        expected = bilinear(image, *size)
        expected = expected[:, ::-1] if flip else expected
        written = slot[: size[0], : size[1]].astype(float)
        assert np.abs(written - expected).max() <= 1  # OpenCV's weights are fixed-point
        slot[: size[0], : size[1]] = 0
        assert not slot.any()

    @pytest.mark.parametrize("width", [1, 2, 15, 64, 101, 1499])
    def test_flip_is_exact(self, width):
        plain, flipped = (
            filled(random_image(5, 30, 50), (21, width), flip).image[0] for flip in (False, True)
        )
        np.testing.assert_array_equal(flipped[:, :width], plain[:, :width][:, ::-1])
        assert not flipped[:, width:].any()

    @pytest.mark.skipif(not FRAMES.is_dir(), reason="real frames are not here")
    def test_real_frame_as_the_published_order_of_steps(self):
        path = sorted(FRAMES.glob("*.jpg"))[0]
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        expected = cv2.flip(cv2.resize(bgr, (1500, 844)), 1)[..., ::-1]
        batch = filled(transforms.decode_jpeg(path.read_bytes(), "a"), (844, 1500), True)
        np.testing.assert_array_equal(batch.image[0, :844, :1500], expected)

    @pytest.mark.parametrize("flip", [False, True])
    def test_people_against_literal_code(self, flip):
        rng = np.random.default_rng(6)
        boxes = rng.uniform(-40, 160, (50, 4)).astype(np.float32)
        boxes[:, 2:] = boxes[:, :2] + rng.uniform(0, 90, (50, 2))
        height, width = 60, 90
        batch = filled(random_image(6, 40, 50), (height, width), flip, *boxes)
        np.testing.assert_array_equal(batch.size, [[height, width]])
        np.testing.assert_allclose(batch.scale, [[90 / 50, 60 / 40]], rtol=1e-6)
        assert batch.valid_image.tolist() == [True]
        assert batch.valid[0].tolist() == [True] * 50 + [False] * 6
        np.testing.assert_array_equal(batch.identity[0], [*range(50), *[0] * 6])
        np.testing.assert_array_equal(batch.labeled[0], [True, False] * 25 + [False] * 6)
        for box, found in zip(boxes.astype(float), batch.boxes[0], strict=False):
            x1, x2 = (min(max(x * 90 / 50, 0), width) for x in (box[0], box[2]))
            y1, y2 = (min(max(y * 60 / 40, 0), height) for y in (box[1], box[3]))
            if flip:
                x1, x2 = width - x2, width - x1
            np.testing.assert_allclose(found, [x1, y1, x2, y2], atol=1e-4)

    def test_rows_do_not_touch_each_other_and_nobody_is_possible(self):
        batch = transforms.empty_batch(2, (64, 96), 8)
        assert batch.image.dtype == np.uint8
        np.testing.assert_array_equal(batch.size, [[64, 96]] * 2)
        batch.image[:] = 7
        transforms.fill_image(batch, 1, random_image(7, 20, 30), (60, 90), False)
        assert (batch.image[0] == 7).all()
        assert batch.valid_image.tolist() == [False, True]
        assert not batch.valid.any()
        assert not filled(random_image(7, 20, 30), (60, 90), True).valid.any()
