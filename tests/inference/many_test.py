"""Many photos at once give what each gives alone, in their order and a few at a time."""

from __future__ import annotations

import os
import time

import pytest

from alignps_jax.inference.many import Photo, detect_all
from tests.gallery.painted import Finder, photo


def find_all(tasks):
    finder = Finder()
    return detect_all(finder.detect_batch, finder.config.data, finder.rows, tasks)


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
