"""Sampling points and heat maps, against closed forms and automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.inference.detector import Detector
from alignps_jax.inference.location_maps import (
    LocationMaps,
    location_xy,
    nearest_location,
    sampling_points,
    similarity_map,
)
from alignps_jax.nn.deform_conv import deform_conv2d
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.nn.neck import upsample_nearest
from alignps_jax.types import UserError, Weights
from configs import tiny

SCALE = np.array([0.5, 0.4], np.float32)  # x, y: a photo of twice and 2.5 times the size


def make_maps(height=12, width=16, embeddings=(), strides=(), **offsets):
    """Maps of a photo whose resized version has `height` x `width` locations of stride 8."""
    zeros = {
        "output3": np.zeros((height, width, 9, 2)),
        "lateral3": np.zeros((height, width, 9, 2)),
        "lateral4": np.zeros((height // 2, width // 2, 9, 2)),
    }
    size = np.array([height * 8 - 3, width * 8 - 6])
    return LocationMaps(embeddings, strides, zeros | offsets, size, SCALE)


@functools.partial(jax.jit, static_argnums=4)
def read_weights(output, lateral, output_kernel, lateral_kernel, level):
    """How much every pixel of C3 (C4) counts at every location of P3, for kernels of a channel."""

    def p3(c):
        made = deform_conv2d(c[None, :, :, None], lateral[None], lateral_kernel)
        above = made if level == 3 else upsample_nearest(made)
        return deform_conv2d(above, output[None], output_kernel)[0, :, :, 0]

    return jax.jacrev(p3)(jnp.zeros(lateral.shape[:2]))


def one_hot(tap):
    return jnp.zeros(9).at[tap].set(1.0).reshape(3, 3, 1, 1)


@pytest.mark.parametrize("level", [3, 4])
def test_points_are_what_the_convolutions_read(level):
    """The gradient of P3 by the backbone's map lies where the points are, for any offsets."""
    rng = np.random.default_rng(level)
    output = rng.normal(size=(12, 16, 9, 2)) * 1.3
    shape = make_maps().offsets[f"lateral{level}"].shape
    lateral = rng.normal(size=shape) * 0.6
    maps = make_maps(output3=output, **{f"lateral{level}": lateral})
    height, width = shape[:2]
    rows, columns = np.mgrid[:height, :width]
    factor = 2**level / SCALE
    compared = unused = 0
    for outer, inner in ((0, 0), (8, 1), (3, 5)):
        weights = read_weights(output, lateral, one_hot(outer), one_hot(inner), level)
        for location in np.ndindex(12, 16):
            points = sampling_points(maps, np.array(location), level)
            read = np.asarray(weights[location])
            number = 9 * outer + inner
            if np.isnan(points[number]).all():
                unused += 1
                assert (read == 0).all()
            elif read.sum() > 1 - 1e-5:  # nothing beyond the map's border
                center = np.array([(columns * read).sum(), (rows * read).sum()]) / read.sum()
                np.testing.assert_allclose(points[number], (center + 0.5) * factor, atol=2e-3)
                compared += 1
    assert compared > 250
    assert unused > 5


def test_locations_and_the_photos_pixels():
    maps = make_maps()
    for location in ((0, 0), (3, 7), (11, 15)):
        xy = location_xy(maps, np.array(location))
        np.testing.assert_allclose(xy, [(8 * location[1] + 4) / 0.5, (8 * location[0] + 4) / 0.4])
        assert tuple(nearest_location(maps, xy)) == location
        assert tuple(nearest_location(maps, xy + np.array([7, 9]))) == location
    assert tuple(nearest_location(maps, np.array([-50.0, 1e6]))) == (11, 0)


@pytest.mark.parametrize("name", ["output3", "lateral4"])
def test_plain_convolutions_have_no_sampling_points(name):
    maps = make_maps()
    del maps.offsets[name]
    with pytest.raises(UserError, match=name) as error:
        sampling_points(maps, np.array([1, 1]), 4)
    assert "\n" not in str(error.value)


def test_similarity_map():
    fine = np.zeros((12, 16, 3), np.float32)
    fine[..., 1] = 1
    fine[4, 7] = (1, 0, 0)
    coarse = np.zeros((6, 8, 3), np.float32)
    coarse[..., 0] = 0.125
    query = np.array([1.0, 0, 0])
    heat = similarity_map(make_maps(embeddings=(fine, coarse), strides=(8, 16)), query)
    assert heat.shape == (93, 122)
    # Bilinear around the center (60, 36) of the one similar location; else the other level.
    y, x = (np.arange(side) + 0.5 for side in heat.shape)
    expected = np.outer(np.maximum(1 - abs(y - 36) / 8, 0), np.maximum(1 - abs(x - 60) / 8, 0))
    np.testing.assert_allclose(heat, np.maximum(expected, 0.125), atol=1e-6)
    alone = similarity_map(make_maps(embeddings=(fine,), strides=(8,)), query)
    np.testing.assert_allclose(alone, expected, atol=1e-6)


def test_maps_of_the_network():
    """Random weights, but for the neck's offsets, which are their biases everywhere."""
    config = tiny.get_config()
    config.model.remat = True  # which hides what happens inside, if it is not left out
    config.lock()
    template = weights_template(build_model(config))
    rng = np.random.default_rng(0)
    params, frozen = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        (template.params, template.frozen),
    )
    shapes = {"lateral3": (8, 16), "lateral4": (4, 8), "output3": (8, 16)}
    for number, name in enumerate(shapes):
        params["neck"][name]["offset"]["kernel"][:] = 0
        params["neck"][name]["offset"]["bias"][:] = np.arange(18) / 16 + number
    detector = Detector(config, Weights(np.int32(1), params, frozen))
    maps = detector.maps(rng.integers(0, 256, (200, 400, 3), np.uint8))
    # 128 x 64 pixels within a bucket of 128 x 96.
    np.testing.assert_array_equal(maps.size, [64, 128])
    np.testing.assert_allclose(maps.scale, [128 / 400, 64 / 200])
    assert maps.strides == (8,)
    assert maps.embeddings[0].shape == (8, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(maps.embeddings[0], axis=-1), 1, atol=1e-5)
    for number, (name, shape) in enumerate(shapes.items()):
        expected = np.broadcast_to(np.arange(18).reshape(9, 2) / 16 + number, (*shape, 9, 2))
        np.testing.assert_array_equal(maps.offsets[name], expected)
