"""Many photos at once give what each gives alone, in their order and a few at a time."""

from __future__ import annotations

import os
import time

import jax
import numpy as np
import pytest

from alignps_jax.files import write_image
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import Photo, detect_all
from alignps_jax.types import UserError
from tests.gallery.finder import Finder
from tests.gallery.networks import network_config, photo, write_checkpoint


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("run"), network_config())
    return Detector.from_checkpoint(folder)


def find_all(tasks):
    finder = Finder()
    return detect_all(finder.detect_batch, finder.config.data, finder.rows, tasks)


def test_many_photos_are_found_as_each_alone(detector, tmp_path):
    """Landscape and portrait in turns, so that batches fill up out of order."""
    sizes = [(96, 128), (128, 96), (50, 100), (96, 128), (300, 90)]
    photos = [photo(seed, *sizes[seed * 7 % 5]) for seed in range(11)]
    write_image(tmp_path / "a.png", photos[4])
    mixed = [*photos[:4], tmp_path / "a.png", *photos[5:]]
    many = list(detector.detect_many(mixed))
    for found, one in zip(many, photos, strict=True):
        expected = detector.detect(one)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, expected)
    assert list(detector.detect_many([])) == []


@pytest.mark.usefixtures("unchecked")
def test_a_photo_that_cannot_be_read_comes_in_its_turn(detector):
    found = detector.detect_many([photo(0), "nothing.jpg", photo(1)])
    assert len(next(found).scores)
    with pytest.raises(UserError, match=r"nothing\.jpg: cannot be read"):
        next(found)


def test_photos_are_taken_a_few_ahead_only():
    """One portrait among many landscapes does not hold up everything behind it."""
    taken = 0

    def photos():
        nonlocal taken
        for number in range(1000):
            taken += 1
            size = (96, 128) if number else (128, 96)
            yield lambda number=number, size=size: Photo(number, photo(number, *size))

    found = find_all(photos())
    for number in range(20):
        assert next(found).tag == number
        assert taken < number + 20 + 2 * len(os.sched_getaffinity(0))
    found.close()
    closed = taken
    time.sleep(0.1)
    assert taken == closed


def test_what_fails_in_the_tasks_is_raised():
    def fail():
        raise OSError("a disk")

    def tasks():
        yield lambda: Photo(0, photo(0))
        fail()

    for failing in (tasks(), [lambda: Photo(0, photo(0)), fail]):
        with pytest.raises(OSError, match="a disk"):
            list(find_all(failing))


def test_the_fingerprint_is_of_the_weights(detector, tmp_path):
    same = write_checkpoint(tmp_path / "same", network_config(0.9))
    other = write_checkpoint(tmp_path / "other", network_config(), seed=1)
    assert Detector.from_checkpoint(same).fingerprint == detector.fingerprint
    assert Detector.from_checkpoint(other).fingerprint != detector.fingerprint
