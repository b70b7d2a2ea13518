"""Pixels and boxes against slow, literal code."""

import math

import cv2
import numpy as np
import pytest

from alignps_jax.types import Annotations
from data_pipeline import transforms

PAPER_SCALES = ((667, 400), (1000, 600), (1333, 800), (1500, 900), (1666, 1000), (2000, 1200))


def random_image(seed, height, width):
    """A smooth random RGB image (JPEG keeps it, and interpolation is visible)."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


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
        assert transforms.rescaled_sizes(np.array([size]), [scale]).tolist() == [[[*expected]]]

    def test_all_photos_fit_all_scales_and_keep_their_ratio(self):
        photos = np.random.default_rng(0).integers(32, 3000, (300, 2))
        found = transforms.rescaled_sizes(photos, PAPER_SCALES)
        for (height, width), row in zip(photos.tolist(), found.tolist(), strict=True):
            for (long, short), size in zip(PAPER_SCALES, row, strict=True):
                factor = min(long / max(height, width), short / min(height, width))
                assert size == [int(height * factor + 0.5), int(width * factor + 0.5)]

    def test_a_square_counts_as_portrait(self):
        shapes = [(10, 11), (11, 10), (10, 10)]
        assert [transforms.is_landscape(shape) for shape in shapes] == [True, False, False]


def test_two_buckets_per_scale_smallest_first_without_repeats():
    found = transforms.buckets(((1500, 900), (667, 400)))
    assert found == ((416, 672), (672, 416), (928, 1504), (1504, 928))
    assert transforms.buckets(((640, 640), (639, 630))) == ((640, 640),)


class TestFilling:
    @pytest.mark.parametrize("size", [(23, 31), (60, 90), (40, 64), (1, 7), (9, 1)])
    def test_pixels_against_literal_bilinear_and_their_mirror(self, size):
        image, (height, width) = random_image(4, 40, 64), size
        slot, flipped = (filled(image, size, flip).image[0] for flip in (False, True))
        written = slot[:height, :width].astype(float)
        # OpenCV's weights are fixed-point.
        assert np.abs(written - bilinear(image, *size)).max() <= 1
        np.testing.assert_array_equal(flipped[:height, :width], written[:, ::-1])
        for rest in (slot, flipped):
            rest[:height, :width] = 0
            assert not rest.any()

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
