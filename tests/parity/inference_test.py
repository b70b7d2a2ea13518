"""Every stage of inference against the PyTorch oracle, at full size (`make parity`).

The four models differ in weights, in the deformable backbone and in the memory's shapes.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="make parity runs these")
pytest.importorskip("torchvision", reason="make parity runs these")

import torch

from alignps_jax.inference.predict import PredictStep
from alignps_jax.types import Batch
from data_pipeline.pipeline import single_image_batch
from tests.oracle import alignps_torch
from tests.parity.common import MODELS, Pair, make_pair, nhwc, photo, released_pixels
from tests.parity.ours import relative_error, run_stages

SCALES = ((1500, 900), (667, 400))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"{scale[0]}x{scale[1]}")
def test_every_stage_and_the_detections(pair, scale):
    image = photo("prw" if "prw" in pair.workdir.name else "cuhk")
    pixels, size, factors = released_pixels(image, scale)
    with torch.no_grad():
        outputs, expected = pair.oracle(pixels)
        expected = {name: nhwc(value) for name, value in expected.items()}
        expected |= {key: nhwc(outputs[0][key]) for key in ("cls", "box", "centerness")}
        wanted = alignps_torch.detect(outputs[0], size, factors)
        wanted = {key: value.numpy() for key, value in wanted.items()}

    config = pair.config.copy_and_resolve_references()
    config.data.test_scale = scale
    batch = single_image_batch(np.ascontiguousarray(image[..., ::-1]), config.data)
    np.testing.assert_array_equal(batch.size[0], size)
    stages, detections = run_stages(pair.model, pair.weights, pair.config.eval, batch)
    assert set(stages) == set(expected)

    errors = {}
    for name, value in expected.items():
        rows, columns = value.shape[1:3]
        errors[name] = relative_error(stages[name][:, :rows, :columns], value)
    valid = detections.valid[0]
    count = len(wanted["scores"])
    found = {key: getattr(detections, key)[0][valid] for key in wanted}
    print(
        f"\n{pair.workdir.name} {scale[0]}x{scale[1]}", {k: f"{v:.1e}" for k, v in errors.items()}
    )
    assert count > 20
    assert valid.sum() == count
    cosine = (found["embeddings"] * wanted["embeddings"]).sum(1)
    score_error = np.abs(found["scores"] - wanted["scores"]).max()
    box_error = np.abs(found["boxes"] - wanted["boxes"]).max()
    print(
        f"{count} detections: scores {score_error:.1e}, boxes {box_error:.1e} px, "
        f"cosine >= {cosine.min():.6f}"
    )
    assert max(errors.values()) <= 1e-4
    assert score_error <= 1e-4
    assert box_error <= 0.05
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("pair", ["cuhk", "cuhk_plus"], indirect=True)
def test_bucket_and_company_do_not_change_the_detections(pair):
    config = pair.config.copy_and_resolve_references()
    config.data.test_scale = (667, 400)
    photos = [np.ascontiguousarray(photo(name)[..., ::-1]) for name in ("cuhk", "prw")]
    alone = single_image_batch(photos[0], config.data)
    config.data.test_scale = (736, 448)
    other = single_image_batch(photos[1], config.data)
    height, width = (max(alone.image.shape[i], other.image.shape[i]) for i in (1, 2))

    def widened(batch: Batch) -> Batch:
        rows, columns = height - batch.image.shape[1], width - batch.image.shape[2]
        image = np.pad(batch.image, ((0, 0), (0, rows), (0, columns), (0, 0)))
        return batch.replace(image=image)

    rows, columns = (-(-alone.size[0] // 32) * 32).tolist()
    tight = alone.replace(image=alone.image[:, :rows, :columns])
    larger = widened(alone)
    together = jax.tree.map(lambda a, b: np.concatenate([a, b]), widened(other), larger)
    predict = jax.jit(PredictStep(pair.model, config.eval))
    first = predict(pair.weights.params, pair.weights.frozen, tight)
    assert first.valid.sum() > 20
    for batch, row in ((larger, 0), (together, 1)):
        found = predict(pair.weights.params, pair.weights.frozen, batch)
        np.testing.assert_array_equal(found.valid[row], first.valid[0])
        np.testing.assert_allclose(found.scores[row], first.scores[0], atol=1e-4)
        np.testing.assert_allclose(found.boxes[row], first.boxes[0], atol=0.05)
