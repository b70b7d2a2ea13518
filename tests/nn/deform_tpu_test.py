"""Windows of the map and gathers of what lies outside them, as on TPUs, against the CPU's tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.nn.deform_conv import deform_conv2d
from tests.nn.deform_conv_test import as_on


def make_case(size, channels=5, features=3, *, spread=6.9, seed=0):
    """Inputs, offsets, kernel and mask; offsets uniform within `spread` pixels."""
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(*size, channels)),
        rng.uniform(-spread, spread, size=(*size, 9, 2)),
        rng.normal(size=(3, 3, channels, features)),
        rng.uniform(0.1, 1.5, size=(*size, 9)),
    )
    return [a.astype(np.float32) for a in arrays]


def evaluate(platform, arrays):
    """Output, and gradients of a random projection of it in all four arrays."""

    @jax.jit
    def run(inputs, offsets, kernel, mask):
        out, pull = jax.vjp(deform_conv2d, inputs, offsets, kernel, mask)
        weights = np.random.default_rng(9).normal(size=out.shape)
        return out, *pull(jnp.asarray(weights, out.dtype))

    with as_on(platform):
        return run(*arrays)


def assert_same(arrays, tolerance=2e-5):
    """On CPUs and TPUs."""
    for a, e in zip(evaluate("tpu", arrays), evaluate("cpu", arrays), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, atol=tolerance * max(np.abs(e).max(), 1))


def outside(arrays):
    """Whether no, few or many locations have samples outside their windows: 0, 1, 2."""
    taken = []

    def switch(case, branches, *args):
        taken.append(int(case))
        return branches[taken[-1]](*args)

    with pytest.MonkeyPatch.context() as patch, as_on("tpu"):
        patch.setattr("alignps_jax.nn.deform_tpu.lax.switch", switch)
        deform_conv2d(*map(jnp.asarray, arrays))
    return taken[0]


SIZES = [
    (1, 1, 1),  # one pixel
    (1, 8, 16),  # one block
    (2, 9, 17),  # one pixel more than a block, either way
    (1, 33, 5),  # high
    (2, 20, 37),  # blocks with nine neighbors, images that must not see each other
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("band", [1, 96])
def test_offsets_inside_the_windows(size, band, monkeypatch):
    monkeypatch.setattr("alignps_jax.nn.deform_tpu.BAND", band)
    arrays = make_case(size)
    assert outside(arrays) == 0
    assert_same(arrays)


@pytest.mark.parametrize("offset", [0.0, -7.0, 6.99])
def test_equal_offsets(offset):
    """Zero is a plain convolution; whole pixels have the derivative to larger coordinates."""
    arrays = make_case((1, 18, 35))
    arrays[1] = np.full_like(arrays[1], offset)
    assert_same(arrays)


@pytest.mark.parametrize("spread", [7.5, 8.5])
def test_few_offsets_outside(spread):
    """Some of their corners are in the window and some are not, or none is."""
    arrays = make_case((1, 26, 40), spread=1)
    for place in ((0, 0), (16, 16), (25, 39)):
        arrays[1][0, *place, 0] = (-spread, spread)
    assert outside(arrays) == 1
    assert_same(arrays)


def test_many_offsets_outside():
    arrays = make_case((2, 20, 37), spread=20)
    assert outside(arrays) == 2
    assert_same(arrays, 1e-4)


def test_samples_outside_the_map_are_no_reason_for_gathers():
    arrays = make_case((1, 6, 9), spread=30)
    assert outside(arrays) == 0
    assert_same(arrays)
