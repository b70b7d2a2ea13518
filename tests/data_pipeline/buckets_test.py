"""Shapes chosen from the photos: as good as the best of all divisions, and few."""

import itertools

import numpy as np
import pytest

from alignps_jax.types import UserError
from data_pipeline.buckets import choose_buckets
from data_pipeline.transforms import rescaled_sizes

PAPER_SCALES = ((667, 400), (1000, 600), (1333, 800), (1500, 900), (1666, 1000), (2000, 1200))


def sizes_at(photos, scales=PAPER_SCALES) -> np.ndarray:
    return rescaled_sizes(np.array(photos), scales)


def rounded(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // 32) * 32


def least_pixels(boxes: np.ndarray, parts: int) -> int:
    """Of all divisions of some rows into so many stretches, by trying each."""
    count = len(boxes)
    found = []
    for cuts in itertools.combinations(range(1, count), parts - 1):
        edges = (0, *cuts, count)
        stretches = [boxes[a:b] for a, b in itertools.pairwise(edges)]
        found.append(sum(int(part.max(axis=0).prod()) * len(part) for part in stretches))
    return min(found)


def padding_of(sizes, groups, shapes) -> float:
    """The share of padding where each group's photos come into batches together."""
    pixels = 0
    for group, scale in itertools.product(groups, range(sizes.shape[1])):
        height, width = sizes[group, scale].max(axis=0)
        pixels += len(group) * min(h * w for h, w in shapes if h >= height and w >= width)
    return 1 - sizes.prod(axis=-1).sum() / pixels


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_at_one_scale_no_division_pads_less(most):
    rng = np.random.default_rng(most)
    ratios = np.sort(rng.uniform(0.5, 2.0, 9))
    photos = [(1000, round(1000 * ratio)) for ratio in ratios]
    sizes = sizes_at(photos, [(640, 480)])
    groups, shapes = choose_buckets(sizes, np.arange(9), most, batch_size=1)
    assert len(shapes) <= most
    pixels = least_pixels(rounded(sizes)[:, 0], most)
    found = padding_of(sizes, groups, shapes)
    assert found == pytest.approx(1 - sizes.prod(axis=-1).sum() / pixels)


def test_mixed_photos_need_24_programs_for_6_percent():
    landscape = [(1200, 1600), (1080, 1920), (2000, 3000)]
    kinds = [*landscape, *(photo[::-1] for photo in landscape)]
    photos = [kinds[i] for i in np.random.default_rng(0).integers(0, 6, 600)]
    sizes = sizes_at(photos)
    groups, shapes = choose_buckets(sizes, np.arange(600), 24, batch_size=32)
    assert len(shapes) <= 24
    assert len(groups) == 6
    assert padding_of(sizes, groups, shapes) <= 0.06
    fewer = choose_buckets(sizes, np.arange(600), 12, 32)
    assert padding_of(sizes, *fewer) > padding_of(sizes, groups, shapes)


def test_every_photo_is_in_one_group_and_every_group_fills_a_batch():
    rng = np.random.default_rng(1)
    photos = rng.integers(200, 2000, (300, 2)).tolist()
    usable = np.sort(rng.permutation(300)[:250])
    groups, shapes = choose_buckets(sizes_at(photos), usable, 24, batch_size=16)
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), usable)
    assert min(map(len, groups)) >= 16
    assert all(side % 32 == 0 for shape in shapes for side in shape)
    assert len(shapes) <= 24


def test_few_photos_make_one_group_and_few_programs_an_error():
    sizes = sizes_at([(300, 400), (400, 300)])
    groups, shapes = choose_buckets(sizes, np.arange(2), 24, batch_size=4)
    assert [group.tolist() for group in groups] == [[0, 1]]
    assert len(shapes) == 6
    with pytest.raises(UserError, match="max_programs: found 5, expected at least one for each of"):
        choose_buckets(sizes, np.arange(2), 5, batch_size=1)
