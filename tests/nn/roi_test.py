"""The RoI branch: RoIAlign against literal samples, its layers against formulas in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.nn.roi import BatchNorm, MutualInformation, RoIHead, RPNHead, max_pool, roi_align
from tests.fakes import randomize

# x1, y1, x2, y2 in pixels, of a map of 13 x 17.
ODD_BOXES = [
    (20.3, 11.7, 80.9, 190.2),  # a person
    (5.2, 3.1, 255.9, 204.4),  # almost everything
    (50.1, 60.2, 50.9, 60.7),  # less than a pixel
    (-40.7, 30.3, 49.4, 110.5),  # partly outside, on all sides
    (100.2, -33.3, 144.3, 57.2),
    (240.9, 100.1, 318.6, 150.4),
    (90.5, 170.4, 123.8, 270.3),
    (-500, -500, -300, -300),  # outside
    (280, 30, 340, 90),  # within a pixel of the border
    (-3000, -2000, 4000, 2500),  # huge
    (30, 40, 30, 90),  # without area
    (0, 0, 0, 0),
    (90, 80, 60, 40),  # corners swapped
    (33.3, 20.1, 257.3, 244.1),  # 1 x 1 samples, 2 x 1 in float64
    (0.1, 20.1, 448.1, 244.1),  # 1 x 2, 2 x 3 in float64
    (-16, -16, 208, 208),  # samples exactly at -1, at the height, and at the width
    (272, 208, 496, 432),
    (-38, -102, 298, 234),  # cells of 1.5, which are more by a product with 1/14
]
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


def axis_samples(low, high, size, side):
    """Of every cell: its samples, as lists of (pixel, weight) that are empty outside."""
    f32 = np.float32
    start = f32(low) / f32(16) - f32(0.5)
    length = (f32(high) / f32(16) - f32(0.5)) - start
    cell = length / f32(size)
    count = int(np.ceil(cell))

    def sample(index, number):
        at = start + f32(index) * cell + f32(number + 0.5) * cell / f32(count)
        if at < -1 or at > side:
            return []
        at = max(at, f32(0))
        if (first := int(at)) >= side - 1:
            return [(side - 1, 1.0)]
        fraction = float(at - f32(first))
        return [(first, 1 - fraction), (first + 1, fraction)]

    return [[sample(index, number) for number in range(count)] for index in range(size)]


def literal(features, boxes, d_out):
    """Values and gradient of RoIAlign, one sample after another, sums in float64."""
    (height, width, _), size = features.shape, d_out.shape[1]
    out, d_features = np.zeros(d_out.shape), np.zeros(features.shape)
    for box, (x1, y1, x2, y2) in enumerate(boxes):
        rows, columns = axis_samples(y1, y2, size, height), axis_samples(x1, x2, size, width)
        count = len(rows[0]) * len(columns[0])
        for i, j in np.ndindex(size, size):
            samples = [(a, b) for a in rows[i] for b in columns[j]]
            for (y, wy), (x, wx) in ((c, d) for a, b in samples for c in a for d in b):
                out[box, i, j] += wy * wx / count * features[y, x]
                d_features[y, x] += wy * wx / count * d_out[box, i, j]
    return out, d_features


@pytest.mark.parametrize(
    ("shape", "padding"), [((13, 17, 3), (3, 7)), ((60, 45, 2), (0, 0)), ((1, 1, 1), (2, 1))]
)
def test_roi_align(shape, padding):
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(-3, 19, (25, 2, 2)), axis=1) * shape[1::-1]
    boxes = np.float32([*ODD_BOXES, *boxes.reshape(25, 4)])
    features = rng.normal(size=shape).astype(np.float32)
    d_out = rng.normal(size=(len(boxes), 14, 14, shape[2])).astype(np.float32)
    expected, d_expected = literal(features, boxes, d_out)

    @jax.jit
    def run(features, boxes, valid):
        out, pull = jax.vjp(lambda f, b: roi_align(f, b, valid), features, boxes)
        return out, *pull(d_out)

    # What is in the padding of a bucket never matters.
    edges = [(0, n) for n in (*padding, 0)]
    padded = np.pad(features, edges, constant_values=1e3)
    out, d_features, d_boxes = run(padded, boxes, np.array(shape[:2], np.int32))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(d_features, np.pad(d_expected, edges), rtol=1e-5, atol=2e-5)
    assert not np.any(d_boxes)


def test_max_pool_passes_the_gradient_to_the_first_of_equal_values():
    x = np.random.default_rng(2).integers(0, 3, (5, 3, 4, 6)).astype(np.float32)
    d_out = np.arange(1, 31, dtype=np.float32).reshape(5, 6)
    found, pull = jax.vjp(max_pool, x)
    flat = x.reshape(5, 12, 6)
    expected = np.zeros_like(flat)
    np.put_along_axis(expected, flat.argmax(1)[:, None], d_out[:, None], 1)
    np.testing.assert_array_equal(found, flat.max(1))
    np.testing.assert_array_equal(pull(d_out)[0].reshape(5, 12, 6), expected)
    assert np.isnan(max_pool(np.where(x == 2, np.nan, x))).any()


one_device = partial(jax.tree.map, jnp.asarray)  # a sum over one


def norm_case():
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(12, 3)) * [1, 30, 0.01] + [5, -100, 0]).astype(np.float32)
    variables = {
        "params": {"scale": np.float32([1.5, -2, 0.3]), "bias": np.float32([0.1, 0.2, -3])},
        "frozen": {"mean": np.float32([1, 2, 3]), "var": np.float32([2, 0.5, 7])},
    }
    return x, rng.random(12) < 0.6, variables


def apply_norm(variables, x, valid, add_up):
    out, state = BatchNorm().apply(variables, x, valid, add_up, mutable=["frozen"])
    return out, state["frozen"]


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(train):
    x, valid, variables = norm_case()
    out, new = apply_norm(
        variables, np.where(valid[:, None], x, 1e6), valid, one_device if train else None
    )
    used, params, old = x[valid].astype(float), *variables.values()
    mean, var = (used.mean(0), used.var(0)) if train else (old["mean"], old["var"])
    expected = (used - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    close(out[valid], expected, atol=2e-4)
    kept, var = (0.9, used.var(0, ddof=1)) if train else (1, 0)
    close(new["mean"], kept * old["mean"] + (1 - kept) * mean)
    close(new["var"], kept * old["var"] + (1 - kept) * var)


def test_batch_norm_of_two_devices_is_that_of_one():
    x, valid, variables = norm_case()
    d_out = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)

    def run(x, valid, d_out, add_up):
        def loss(params, x):
            out, new = apply_norm({**variables, "params": params}, x, valid, add_up)
            return jnp.sum(d_out * out, where=valid[:, None]), (new, out)

        (d_params, d_x), (new, out) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return jax.tree.leaves((add_up(d_params), new)), d_x, out

    one = run(x, valid, d_out, one_device)
    add_up = partial(jax.lax.psum, axis_name="device")
    halves = (a.reshape(2, 6, *a.shape[1:]) for a in (x, valid, d_out))
    two = jax.pmap(partial(run, add_up=add_up), axis_name="device")(*halves)
    for got, expected in zip(two[0], one[0], strict=True):
        close(got, np.stack([expected] * 2), atol=1e-4)
    for got, expected in zip(two[1:], one[1:], strict=True):
        scale = np.abs(expected[valid]).max(0)
        close(got.reshape(12, 3)[valid] / scale, expected[valid] / scale, atol=1e-4)


def test_the_rpn_orders_anchors_by_row_column_and_number():
    """With weights that make each output its place in the flat order."""
    c4 = np.zeros((2, 3, 5, 4), np.float32)
    c4[..., 0] = 1 + np.arange(15).reshape(3, 5)
    size = np.full((2, 2), 9, np.int32)
    params = RPNHead().init(jax.random.key(0), c4, size)["params"]
    assert np.std(params["conv"]["kernel"]) == pytest.approx(0.01, rel=0.3)
    params = jax.tree.map(np.zeros_like, params)
    params["conv"]["kernel"][1, 1, 0, 0] = 1
    for name, channels in {"cls": 15, "reg": 60}.items():
        params[name]["kernel"][0, 0, 0] = channels
        params[name]["bias"][:] = np.arange(channels) - channels
    out = RPNHead().apply({"params": params}, c4, size)
    np.testing.assert_array_equal(out.logits, [np.arange(225)] * 2)
    np.testing.assert_array_equal(out.deltas.reshape(2, 900), [np.arange(900)] * 2)


def roi_case():
    """A head with a simple stage and random weights, and what it is given: two images."""
    rng = np.random.default_rng(6)
    c4 = rng.normal(size=(2, 13, 17, 6)).astype(np.float32)
    c4[1, 9:] = c4[1, :, 11:] = 0
    boxes = np.float32(ODD_BOXES[:7] + ODD_BOXES[11:12]).reshape(2, 4, 4)
    valid = np.array([[True, True, True, False], [True, True, False, False]])
    given = c4, np.array([[13, 17], [9, 11]], np.int32), boxes, valid
    head = RoIHead(lambda x, size: (2 * x[:, ::2, ::2, :4] - 1, size // 2), features=8)
    variables = head.init(jax.random.key(1), *given)
    return head, {**variables, "params": randomize(variables["params"], scale=0.5)}, given


def test_roi_head_against_formulas():
    head, variables, (c4, size, boxes, valid) = roi_case()
    out = jax.jit(head.apply)(variables, c4, size, boxes, valid)
    pooled = [roi_align(*image) for image in zip(c4, boxes, size, strict=True)]
    before = np.concatenate(pooled).astype(float)
    after = 2 * before[:, ::2, ::2, :4] - 1

    def normed(x, params):  # with the initial statistics
        return x / np.sqrt(1 + 1e-5) * params["scale"] + params["bias"]

    def linear(x, name):
        p = variables["params"][name]
        return normed(x.max((1, 2)) @ p["kernel"] + p["bias"], variables["params"][f"{name}_bn"])

    projected = np.concatenate([linear(before, "projector0"), linear(after, "projector1")], 1)
    length = np.linalg.norm(projected, axis=1)
    close(out.embeddings.reshape(8, 8), projected / length[:, None])
    close(out.logits.ravel(), normed(length, variables["params"]["rescaler"]))
    close(out.deltas.reshape(8, 4), linear(after, "fc_reg"))


def test_neither_the_bucket_nor_invalid_boxes_matter_nor_any_if_none_is_valid():
    head, variables, (c4, size, boxes, valid) = roi_case()
    apply = partial(head.apply, add_up=one_device, mutable=["frozen"])
    expected = apply(variables, c4, size, boxes, valid)
    padded = np.pad(c4, ((0, 0), (0, 5), (0, 2), (0, 0)))
    found = apply(variables, padded, size, np.where(valid[..., None], boxes, boxes[0, 1]), valid)
    for a, e in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        close(a[valid], e[valid], atol=1e-4)
    jax.tree.map(partial(close, atol=1e-4), found[1], expected[1])

    def loss(params, c4, boxes):
        out, new = apply({**variables, "params": params}, c4, size, boxes, np.zeros_like(valid))
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), new

    for given in ((c4, boxes), (0 * c4, 0 * boxes)):
        grads, new = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], *given)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        jax.tree.map(np.testing.assert_array_equal, new["frozen"], variables["frozen"])


def test_mutual_information_estimator():
    u, v = np.random.default_rng(7).normal(size=(2, 5, 16)).astype(np.float32)
    variables = MutualInformation().init(jax.random.key(0), u, v)
    hidden, output = (variables["params"][name] for name in ("hidden", "output"))
    for values, inputs in ((hidden, 32), (output, 16)):
        assert all(0 < np.abs(x * inputs**0.5).max() <= 1 for x in values.values())
    x = np.maximum(np.concatenate([u, v], 1) @ hidden["kernel"] + hidden["bias"], 0)
    found = MutualInformation().apply(variables, u, v)
    close(found, (x @ output["kernel"] + output["bias"])[:, 0])
