"""Deformable convolution against literal loops, plain JAX and torchvision."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignps_jax.nn import deform_cpu
from alignps_jax.nn.deform_conv import DeformConv, deform_conv2d

# name: (B, H, W, C, F, stride, with mask)
CASES = {
    "more_features": (2, 7, 5, 3, 6, 1, True),
    "fewer_features": (2, 5, 8, 8, 2, 1, True),
    "far_fewer_features": (2, 6, 7, 24, 3, 1, True),  # projected before it is sampled, on CPUs
    "without_mask": (1, 6, 5, 4, 4, 1, False),
    "stride_2": (2, 7, 9, 5, 3, 2, True),
    "one_pixel": (1, 1, 1, 3, 2, 1, True),
}
# A default that platforms without an own way take, as GPUs do.
WAYS = ("cpu", "tpu", "default")


@contextlib.contextmanager
def as_on(platform):
    """What is traced meanwhile takes the way of a platform, wherever it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.default_backend", lambda: platform)
        yield


def make_case(name, spread=2.0, seed=0):
    """Arrays (inputs, offsets, kernel, mask) in float32, and the keyword arguments."""
    batch, height, width, channels, features, stride, with_mask = CASES[name]
    rng = np.random.default_rng(seed)
    h, w = -(-height // stride), -(-width // stride)
    inputs = rng.normal(size=(batch, height, width, channels))
    # Away from the kinks at whole pixels by 0.05, both sides of the border of the image included.
    offsets = np.round(rng.normal(scale=spread, size=(batch, h, w, 9, 2)))
    offsets += rng.uniform(0.05, 0.95, size=offsets.shape)
    kernel = rng.normal(size=(3, 3, channels, features))
    mask = rng.uniform(0.1, 1.5, size=(batch, h, w, 9)) if with_mask else None
    arrays = [inputs, offsets, kernel, mask]
    arrays = [None if a is None else a.astype(np.float32) for a in arrays]
    return arrays, {"stride": stride}


def bilinear_loop(image, y, x):
    """One sample [C] of an image [H, W, C], zero outside; written after the definition."""
    height, width, channels = image.shape
    value = np.zeros(channels)
    if y <= -1 or y >= height or x <= -1 or x >= width:
        return value
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * image[row, column]
    return value


def loop(inputs, offsets, kernel, mask, *, stride=1):
    """The forward pass in float64, one sample at a time."""
    inputs, offsets, kernel = (np.asarray(a, np.float64) for a in (inputs, offsets, kernel))
    out = np.zeros((*offsets.shape[:3], kernel.shape[-1]))
    for b, i, j in np.ndindex(*offsets.shape[:3]):
        for k, (ky, kx) in enumerate(np.ndindex(3, 3)):
            y = i * stride - 1 + ky + offsets[b, i, j, k, 0]
            x = j * stride - 1 + kx + offsets[b, i, j, k, 1]
            factor = 1.0 if mask is None else float(mask[b, i, j, k])
            out[b, i, j] += factor * bilinear_loop(inputs[b], y, x) @ kernel[ky, kx]
    return out


def plain(inputs, offsets, kernel, mask, *, stride=1):
    """Plain JAX for `jax.grad`: dense interpolation matrices, no gather."""
    _, h, w = offsets.shape[:3]
    ky, kx = np.divmod(np.arange(9), 3)
    y = offsets[..., 0] + (np.arange(h) * stride - 1)[:, None, None] + ky
    x = offsets[..., 1] + (np.arange(w) * stride - 1)[:, None] + kx

    def hat(position, size):
        return jax.nn.relu(1 - jnp.abs(position[..., None] - np.arange(size)))

    sampled = jnp.einsum(
        "bijky,bijkx,byxc->bijkc", hat(y, inputs.shape[1]), hat(x, inputs.shape[2]), inputs
    )
    if mask is not None:
        sampled *= mask[..., None]
    return jnp.einsum("bijkc,kcf->bijf", sampled, kernel.reshape(9, *kernel.shape[2:]))


def cotangent(shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def evaluate(function, arrays, options):
    """Output and gradients (of a random projection of it) in those arrays that are there."""

    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(functools.partial(function, **options), *arrays)
        return out, pull(jnp.asarray(cotangent(out.shape), out.dtype))

    out, grads = run(arrays)
    return out, [g for g, a in zip(grads, arrays, strict=True) if a is not None]


def assert_all_close(actual, expected, atol):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=atol)


@functools.cache
def plain_gradients(name):
    arrays, options = make_case(name)
    return evaluate(plain, arrays, options)[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("platform", WAYS)
def test_equals_loop_and_plain_jax(name, platform):
    arrays, options = make_case(name)
    with as_on(platform):
        out, grads = evaluate(deform_conv2d, arrays, options)
    np.testing.assert_allclose(out, loop(*arrays, **options), atol=2e-5)
    assert_all_close(grads, plain_gradients(name), atol=5e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_tiles_of_any_size_give_the_same(size, monkeypatch):
    """There are 70 locations: the last tile is not full."""
    monkeypatch.setattr(deform_cpu, "TILE", size)
    arrays, options = make_case("more_features")
    out, grads = evaluate(deform_conv2d, arrays, options)
    np.testing.assert_allclose(out, loop(*arrays, **options), atol=2e-5)
    assert_all_close(grads, plain_gradients("more_features"), atol=5e-5)


@pytest.mark.parametrize("platform", WAYS)
@pytest.mark.parametrize("spread", [0, 4])
def test_integer_offsets(platform, spread):
    (inputs, offsets, kernel, mask), options = make_case("more_features", spread=spread)
    offsets = np.floor(offsets)
    with as_on(platform):
        out, grads = evaluate(deform_conv2d, [inputs, offsets, kernel, mask], options)
    np.testing.assert_allclose(out, loop(inputs, offsets, kernel, mask, **options), atol=2e-5)
    # The derivative is the one towards larger coordinates.
    direction = np.random.default_rng(1).uniform(0.5, 1, size=offsets.shape)
    weights = cotangent(out.shape)
    ahead = loop(inputs, offsets + 1e-5 * direction, kernel, mask, **options)
    behind = loop(inputs, offsets.astype(np.float64), kernel, mask, **options)
    expected = np.sum(weights * (ahead - behind)) / 1e-5
    np.testing.assert_allclose(np.sum(grads[1] * direction), expected, rtol=1e-3)


def test_the_border_of_the_image():
    """A single tap walks over both borders, in steps that hit -1, 0, H - 1 and H exactly."""
    walk = np.arange(-1.5, 4.0, 0.25)
    expected = np.interp(walk, [-1, 0, 1, 2, 3], [0, 1, 2, 3, 0])
    images = np.tile(np.array([1, 2, 3], np.float32).reshape(1, 3, 1, 1), (len(walk), 1, 1, 1))
    offsets, kernel = np.zeros((len(walk), 3, 1, 9, 2), np.float32), np.zeros((3, 3, 1, 1))
    offsets[:, 0, 0, 4, 0], kernel[1, 1] = walk, 1
    out = deform_conv2d(*map(jnp.asarray, (images, offsets, kernel)))
    np.testing.assert_allclose(out[:, 0, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("platform", WAYS)
def test_far_outside_is_zero_with_zero_gradients(platform):
    (inputs, offsets, kernel, mask), options = make_case("more_features")
    far = np.array([1e3, -1e3, 3e9, -1e30, np.inf, -np.inf], np.float32)
    offsets[..., 0] = np.random.default_rng(2).choice(far, size=mask.shape)
    with as_on(platform):
        out, grads = evaluate(deform_conv2d, [inputs, offsets, kernel, mask], options)
    for array in (out, *grads):
        assert not np.any(array)  # NaN would count as nonzero


@pytest.mark.parametrize("platform", WAYS)
def test_nan_offsets_show(platform):
    (inputs, offsets, kernel, mask), options = make_case("more_features")
    offsets[1, 2, 3, 4, 0] = np.nan
    with as_on(platform):
        out = deform_conv2d(*map(jnp.asarray, (inputs, offsets, kernel, mask)), **options)
    assert np.isnan(out[1, 2, 3]).all()
    assert np.isnan(out).sum() == out.shape[-1]


@pytest.mark.parametrize("platform", WAYS)
def test_bfloat16_is_close(platform):
    arrays, options = make_case("fewer_features")
    inputs, offsets, kernel, mask = arrays
    low = [inputs.astype(jnp.bfloat16), offsets, kernel, mask]
    with as_on(platform):
        low_results = evaluate(deform_conv2d, low, options)
    results = loop(*arrays, **options), plain_gradients("fewer_features")
    low_results, results = (jax.tree.leaves(r) for r in (low_results, results))
    types = [jnp.bfloat16, *(a.dtype for a in low)]
    for actual, expected, dtype in zip(low_results, results, types, strict=True):
        assert actual.dtype == dtype
        assert np.abs(actual.astype(np.float32) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("features", [64, 128])
def test_backward_memory_is_linear(features):
    """Temporaries of forward and backward stay far below nine times the sampled columns."""
    height, width, channels = 40, 50, 256
    maps = height * width * channels * 4
    shapes = [(1, height, width, channels), (1, height, width, 9, 2), (3, 3, channels, features)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(inputs, offsets, kernel):
        return jnp.sum(deform_conv2d(inputs, offsets, kernel) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * maps


def test_torchvision():
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    for name in CASES:
        arrays, options = make_case(name)
        if name == "more_features":
            arrays[1] = np.floor(arrays[1])  # kinks too
        inputs, offsets, kernel, mask = (
            None if a is None else torch.tensor(a, requires_grad=True) for a in arrays
        )
        out = ops.deform_conv2d(
            inputs.permute(0, 3, 1, 2),
            offsets.flatten(3).permute(0, 3, 1, 2),
            kernel.permute(3, 2, 0, 1),
            mask=None if mask is None else mask.permute(0, 3, 1, 2),
            padding=1,
            **options,
        ).permute(0, 2, 3, 1)
        out.backward(torch.tensor(cotangent(tuple(out.shape))))
        expected = [t.grad.numpy() for t in (inputs, offsets, kernel, mask) if t is not None]
        actual, grads = evaluate(deform_conv2d, arrays, options)
        np.testing.assert_allclose(actual, out.detach().numpy(), atol=2e-5)
        assert_all_close(grads, expected, atol=5e-5)


@pytest.mark.parametrize(("modulated", "stride"), [(False, 1), (True, 2)])
def test_modules(modulated, stride):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    module = DeformConv(3, stride, modulated, use_bias=True, offset_gain=2.0)
    params = jax.jit(module.init)(jax.random.key(1), inputs)["params"]
    params["bias"] = jnp.arange(3.0)
    channels = 27 if modulated else 18
    params["offset"]["bias"] = rng.normal(0, 0.3, channels).astype(np.float32)
    assert jax.tree.map(jnp.shape, params) == {
        "kernel": (3, 3, 4, 3),
        "bias": (3,),
        "offset": {"kernel": (3, 3, 4, channels), "bias": (channels,)},
    }
    plain = nn.Conv(channels, (3, 3), stride, padding=1)
    predicted = np.asarray(plain.apply({"params": params["offset"]}, inputs))
    offsets = np.stack([predicted[..., 0:18:2], predicted[..., 1:18:2]], axis=-1)
    mask = 1 / (1 + np.exp(-predicted[..., 18:])) if modulated else None
    expected = loop(inputs, offsets, params["kernel"], mask, stride=stride)
    out = jax.jit(module.apply)({"params": params}, inputs)
    np.testing.assert_allclose(out, expected + np.arange(3), atol=1e-4)
    low = DeformConv(3, stride, modulated, use_bias=True, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.init(jax.random.key(0), inputs))} == {
        jnp.dtype(jnp.float32)
    }
    found = jax.jit(low.apply)({"params": params}, inputs)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), out, atol=0.03)


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
def test_module_defaults(modulated, factor):
    """Initially a plain convolution (times one half in DCNv2, the sigmoid of zero)."""
    inputs = np.random.default_rng(0).normal(size=(1, 5, 6, 40)).astype(np.float32)
    module = DeformConv(30, modulated=modulated)
    params = jax.jit(module.init)(jax.random.key(0), inputs)["params"]
    assert set(params) == {"kernel", "offset"}
    limit = 1 / np.sqrt(9 * 40)
    assert 0.98 * limit < np.abs(params["kernel"]).max() <= limit
    plain_conv = nn.Conv(30, (3, 3), padding=1, use_bias=False)
    expected = plain_conv.apply({"params": {"kernel": params["kernel"]}}, inputs)
    out = jax.jit(module.apply)({"params": params}, inputs)
    np.testing.assert_allclose(out, factor * expected, atol=1e-5)
