"""Every stage of inference against the PyTorch oracle, at full size (`make parity`).

The four models differ in weights, in the deformable backbone and in the memory's shapes.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="make parity runs these")
pytest.importorskip("torchvision", reason="make parity runs these")

import torch

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
    assert count > 20
    assert valid.sum() == count
    cosine = (found["embeddings"] * wanted["embeddings"]).sum(1)
    score_error = np.abs(found["scores"] - wanted["scores"]).max()
    box_error = np.abs(found["boxes"] - wanted["boxes"]).max()
    rounded = {name: f"{error:.1e}" for name, error in errors.items()}
    print(f"\n{pair.workdir.name} {scale}: {count} detections, {rounded}")
    print(f"scores {score_error:.1e}, boxes {box_error:.1e} px, cosine {cosine.min():.6f}")
    assert max(errors.values()) <= 1e-4
    assert score_error <= 1e-4
    assert box_error <= 0.05
    assert cosine.min() >= 0.9999
