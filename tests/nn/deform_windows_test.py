"""The kernels for TPUs, interpreted, against the gathers, which have oracles of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignps_jax.nn.deform_blocks import MapSize, chunk_of, inside_windows
from alignps_jax.nn.deform_conv import deform_conv2d
from alignps_jax.nn.deform_gathers import Order
from alignps_jax.nn.deform_outside import SOME
from alignps_jax.nn.deform_sampling import Windows, corners

GATHERS = Order(by_taps=True, tile=0)


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


def evaluate(order, arrays, dtype=np.float32):
    """Output, and gradients of a random projection of it in all four arrays."""

    @jax.jit
    def run(inputs, offsets, kernel, mask):
        convolve = functools.partial(deform_conv2d, order=order)
        out, pull = jax.vjp(convolve, inputs.astype(dtype), offsets, kernel, mask)
        weights = np.random.default_rng(9).normal(size=out.shape)
        return out, *pull(jnp.asarray(weights, out.dtype))

    return run(*arrays)


def windows(inputs):
    return Windows(MapSize(*inputs.shape[:3]), GATHERS, interpret=True)


def is_inside(offsets):
    """Whether all samples of a 3x3 convolution are inside the windows."""
    _, height, width, _, _ = offsets.shape
    y, x, ky, kx = np.meshgrid(*map(np.arange, (height, width, 3, 3)), indexing="ij")
    y = (y - 1 + ky).reshape(height, width, 9) + offsets[..., 0]
    x = (x - 1 + kx).reshape(height, width, 9) + offsets[..., 1]
    rows, _ = corners(jnp.asarray(y), jnp.asarray(x), (height, width))
    size = MapSize(*offsets.shape[:3])
    return all(inside_windows(size, row).all() for row in rows)


def assert_all_close(actual, expected, tolerance=2e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, atol=tolerance * max(np.abs(e).max(), 1))


@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1),  # one pixel
        (1, 8, 16),  # one block
        (2, 9, 17),  # one pixel more than a block, either way
        (1, 33, 5),  # high
        (2, 20, 37),  # blocks with nine neighbors, images that must not see each other
    ],
)
def test_equals_gathers(size):
    arrays = make_case(size)
    assert is_inside(arrays[1])
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays))


@pytest.mark.parametrize("offset", [0.0, -7.0, 6.99])
def test_equal_offsets(offset):
    """Zero is a plain convolution; whole pixels have the derivative to larger coordinates."""
    arrays = make_case((1, 18, 35))
    arrays[1] = np.full_like(arrays[1], offset)
    assert is_inside(arrays[1])
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays))


def test_borders_of_the_windows():
    """What is inside depends on the place in the block: the outermost locations have 7 pixels."""
    size = (1, 40, 80)
    for axis, last in ((0, 7), (1, 15)):
        for offset, place, tap, inside in [
            (-7.0, 0, 0, True),
            (-7.01, 0, 0, False),
            (-8.01, 0, 2, True) if axis == 1 else (-8.01, 0, 8, True),
            (6.99, last, 8, True),
            (7.0, last, 8, False),
            (8.0, last - 1, 8, False),
            (7.99, last - 1, 8, True),
            (np.inf, 0, 4, False),
            (1e30, last, 4, False),
        ]:
            offsets = np.zeros((*size, 9, 2), np.float32)
            location = [0, 16, 32]
            location[1 + axis] += place
            offsets[(*location, tap, axis)] = offset
            assert is_inside(offsets) == inside, (axis, offset, place, tap)


@pytest.mark.parametrize("spread", [7.5, 8.5, 1e6])
def test_one_offset_outside(spread):
    """Some of its corners are in the window and some are not, or none is."""
    arrays = make_case((1, 26, 40), spread=1)
    arrays[1][0, 16, 16, 0] = (-spread, spread)
    assert not is_inside(arrays[1])
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays))


@pytest.mark.parametrize("size", [(1, 17, 21), (2, 20, 37)])
def test_more_offsets_outside_than_are_taken_at_a_time(size):
    arrays = make_case(size, spread=20)
    assert np.any(np.abs(arrays[1]) > 8, axis=(3, 4)).sum() > 2 * SOME
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays), 1e-4)


def test_all_samples_at_one_place():
    """Outside the windows of all blocks but the neighbors of one; all add to the same pixels."""
    arrays = make_case((1, 24, 64))
    y, x, ky, kx = np.meshgrid(*map(np.arange, (24, 64, 3, 3)), indexing="ij")
    offsets = np.stack([4.3 - (y - 1 + ky), 9.6 - (x - 1 + kx)], axis=-1)
    arrays[1] = offsets.reshape(arrays[1].shape).astype(np.float32)
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays), 1e-4)


def test_samples_outside_the_map_are_inside_the_windows_at_its_border():
    arrays = make_case((1, 6, 9), spread=30)
    assert is_inside(arrays[1])
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays))


def test_nan_shows_at_its_location_only():
    arrays = make_case((1, 9, 20))
    arrays[1][0, 4, 10, 4, 0] = np.nan
    out = evaluate(windows(arrays[0]), arrays)[0]
    assert np.isnan(out[0, 4, 10]).all()
    assert np.isnan(out).sum() == out.shape[-1]


def test_bfloat16_is_close():
    arrays = make_case((2, 9, 20), channels=16, features=8)
    low = evaluate(windows(arrays[0]), arrays, jnp.bfloat16)
    assert low[0].dtype == low[1].dtype == jnp.bfloat16
    for actual, expected in zip(low, evaluate(GATHERS, arrays), strict=True):
        error = np.abs(np.asarray(actual, np.float32) - expected).max()
        assert error < 0.03 * np.abs(expected).max()


def test_chunks_of_channels_add_up():
    """So many channels that VMEM does not hold all at once."""
    size, channels, features = (1, 3, 18), 2048, 128
    assert chunk_of(MapSize(*size), (9, channels, features)) < channels
    arrays = make_case(size, channels, features)
    assert_all_close(evaluate(windows(arrays[0]), arrays), evaluate(GATHERS, arrays), 1e-4)


def test_vmap_equals_batch():
    arrays = make_case((2, 9, 17))
    order = Windows(MapSize(1, 9, 17), GATHERS, interpret=True)

    def mapped(inputs, offsets, kernel, mask):
        def single(inputs, offsets, mask):
            return deform_conv2d(inputs[None], offsets[None], kernel, mask[None], order=order)[0]

        return jax.vmap(single)(inputs, offsets, mask)

    def loss(convolve, *arrays):
        return jnp.sin(convolve(*arrays)).sum()

    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    actual = jax.jit(gradient(functools.partial(loss, mapped)))(*arrays)
    batch = functools.partial(deform_conv2d, order=GATHERS)
    expected = jax.jit(gradient(functools.partial(loss, batch)))(*arrays)
    assert_all_close(jax.tree.leaves(actual), jax.tree.leaves(expected), 1e-4)


def test_shard_map_and_pmap_over_two_devices():
    arrays = make_case((2, 9, 17))
    order = Windows(MapSize(1, 9, 17), GATHERS, interpret=True)
    expected = evaluate(GATHERS, arrays)[0]
    convolve = functools.partial(deform_conv2d, order=order)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        convolve, mesh=mesh, in_specs=(split, split, whole, split), out_specs=split, check_vma=False
    )
    assert_all_close([jax.jit(sharded)(*arrays)], [expected])
    inputs, offsets, kernel, mask = arrays
    mapped = jax.pmap(convolve, in_axes=(0, 0, None, 0))(
        inputs[:, None], offsets[:, None], kernel, mask[:, None]
    )
    assert_all_close([mapped[:, 0]], [expected])


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 9, 17), (4, 152, 252), (1, 4096, 1023)])
def test_which_corners_are_in_their_windows(size):
    """Against integer division; the last map has almost 2**22 pixels."""
    rng = np.random.default_rng(0)
    images, height, width = size
    pixels = height * width
    at = np.arange(images * pixels)[:, None]
    # Corners near their locations, on either side of the windows' borders, in the same image.
    y, x = at % pixels // width, at % width
    near_y = np.clip(y + rng.integers(-17, 18, (len(at), 2)), 0, height - 1)
    near_x = np.clip(x + rng.integers(-25, 26, (len(at), 2)), 0, width - 1)
    row = (at // pixels * pixels + near_y * width + near_x).astype(np.int32)
    from_y, from_x = near_y - (y // 8 * 8 - 8), near_x - (x // 16 * 16 - 8)
    expected = (from_y >= 0) & (from_y < 24) & (from_x >= 0) & (from_x < 32)
    found = inside_windows(MapSize(*size), jnp.asarray(row.reshape(*size, 2)))
    np.testing.assert_array_equal(found.reshape(-1, 2), expected)
    some = rng.integers(0, len(at), 50)
    places = [jnp.asarray(place) for place in np.unravel_index(some, size)]
    found = inside_windows(MapSize(*size), jnp.asarray(row[some]), places)
    np.testing.assert_array_equal(found, expected[some])
