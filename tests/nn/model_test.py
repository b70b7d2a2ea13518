"""The network: shapes, and results that do not depend on the bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.model import build_model, init_variables
from configs import tiny
from tests.fakes import random_batch, randomize


def tiny_model(variant: str = ""):
    config = tiny.get_config(variant)
    model = build_model(config)
    params, frozen = init_variables(model, jax.random.key(0))
    return config, model, randomize(params), frozen


def run(model, params, frozen, image, size, *, train: bool = False):
    """The network's outputs, compiled as a whole (op by op takes much longer)."""
    apply = jax.jit(model.apply, static_argnames="train")
    return apply({"params": params, "frozen": frozen}, image, size, train=train)


def pad(image: np.ndarray, height: int, width: int, value: int) -> np.ndarray:
    rows, columns = height - image.shape[1], width - image.shape[2]
    return np.pad(image, ((0, 0), (0, rows), (0, columns), (0, 0)), constant_values=value)


@pytest.mark.parametrize(("variant", "levels"), [("", 1), ("plus", 1), ("released", 5)])
def test_levels_and_shapes(variant, levels):
    _, model, params, frozen = tiny_model(variant)
    image = np.zeros((2, 96, 160, 3), np.uint8)
    size = np.array([[96, 160], [70, 101]], np.int32)
    outputs = run(model, params, frozen, image, size, train=True)
    assert len(outputs) == levels
    assert outputs[0].cls_logits.shape == (2, 12, 20)
    assert outputs[0].box_distances.shape == (2, 12, 20, 4)
    assert outputs[0].embeddings.shape == (2, 12, 20, 16)
    # 70 x 101 pixels are fed as 96 x 128: 12 x 16 locations.
    np.testing.assert_array_equal(outputs[0].valid.sum((1, 2)), [12 * 20, 12 * 16])
    assert len(run(model, params, frozen, image, size)) == 1


@pytest.mark.parametrize("variant", ["", "plus", "released", "baseline"])
def test_the_bucket_never_changes_a_result(variant):
    _, model, params, frozen = tiny_model(variant)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 96, 128, 3), dtype=np.uint8)
    size = np.array([[80, 109]], np.int32)
    # Whatever lies in the padding does not matter either.
    larger = pad(image, 160, 224, value=77)
    larger[:, 80:, :] = 13
    batch = np.concatenate([rng.integers(0, 256, larger.shape, dtype=np.uint8), larger])
    sizes = np.array([[160, 224], [80, 109]], np.int32)
    alone = run(model, params, frozen, image, size, train=True)
    beside = run(model, params, frozen, batch, sizes, train=True)
    for tight, loose in zip(alone, beside, strict=True):
        rows, columns = tight.cls_logits.shape[1:]
        cut = jax.tree.map(lambda x, r=rows, c=columns: x[1:, :r, :c], loose)
        for found, expected in zip(jax.tree.leaves(cut), jax.tree.leaves(tight), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert not loose.valid[1, rows:].any()
        assert not loose.valid[1, :, columns:].any()


@pytest.mark.parametrize(("variant", "width"), [("", 16), ("roi", 32)])
def test_detections_do_not_depend_on_bucket_or_company(variant, width):
    config, model, params, frozen = tiny_model(variant)
    config.eval.min_cls_score = 0.0
    predict = jax.jit(PredictStep(model, config.eval))
    batch = random_batch(np.random.default_rng(4), images=3)
    together = predict(params, frozen, batch)
    for row in range(3):
        one = jax.tree.map(lambda x, r=row: x[r : r + 1], batch)
        alone = predict(params, frozen, one.replace(image=pad(one.image, 128, 192, 0)))
        assert alone.valid.sum() > 5
        np.testing.assert_array_equal(alone.valid[0], together.valid[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-4)
        np.testing.assert_allclose(alone.boxes[0], together.boxes[row], atol=1e-2)
        similar = (alone.embeddings[0] * together.embeddings[row]).sum(axis=-1)
        np.testing.assert_allclose(similar[alone.valid[0]], 1, atol=1e-4)
        assert alone.embeddings.shape[-1] == width


def test_embeddings_have_zero_mean_over_the_valid_region():
    _, model, params, frozen = tiny_model()
    batch = random_batch(np.random.default_rng(6), images=2)
    (output,) = run(model, params, frozen, batch.image, batch.size)
    total = (output.embeddings * output.valid[..., None]).sum((1, 2))
    np.testing.assert_allclose(total, 0, atol=1e-2)
    np.testing.assert_array_equal(output.embeddings[~output.valid], 0)


def test_bfloat16_gives_float32_outputs_close_to_float32():
    config, model, params, frozen = tiny_model()
    batch = random_batch(np.random.default_rng(7), images=1)
    expected = run(model, params, frozen, batch.image, batch.size)[0]
    config.model.dtype = "bfloat16"
    low = build_model(config)
    found = run(low, params, frozen, batch.image, batch.size)[0]
    for name in ("cls_logits", "box_distances", "embeddings"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == np.float32
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), name


def test_remat_changes_no_result_and_no_gradient():
    batch = random_batch(np.random.default_rng(0))
    found = []
    for remat in (False, True):
        config = tiny.get_config()
        config.model.remat = remat
        model = build_model(config)
        params, frozen = init_variables(model, jax.random.key(0))

        def loss(params, model=model, frozen=frozen):
            variables = {"params": params, "frozen": frozen}
            outputs = model.apply(variables, batch.image, batch.size, train=True)
            maps = [x for x in jax.tree.leaves(outputs) if x.dtype == np.float32]
            return sum(jnp.sin(x / 3).sum() for x in maps)

        found.append(jax.jit(jax.value_and_grad(loss))(randomize(params)))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(np.abs(b).max(), 1e-3))
