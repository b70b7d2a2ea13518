"""Traces of chosen steps."""

import jax.numpy as jnp
import pytest

from alignps_jax.training.profile import Profiler, traced_steps
from alignps_jax.types import UserError


@pytest.mark.parametrize("start", [1, 3])  # a resumed run may begin in the middle
def test_the_steps_asked_for_are_traced(tmp_path, start):
    profiler = Profiler("2:3", tmp_path / "profile")
    written = []
    for step in range(start, 6):
        profiler.begin(step)
        if profiler.end(step, jnp.ones(3) + step):
            written.append(step)
    assert written == [3]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_nothing_is_traced_unless_asked_for(tmp_path):
    profiler = Profiler(None, tmp_path / "profile")
    for step in range(1, 4):
        profiler.begin(step)
        assert not profiler.end(step, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["5", "0:3", "5:4", "a:b", "1:2:3", " 1:2"])
def test_what_is_no_range_of_steps_is_one_line(steps):
    with pytest.raises(UserError, match=r"config\.train\.profile: found .*100:105"):
        traced_steps(steps)
