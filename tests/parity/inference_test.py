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
from alignps_jax.types import Batch, Detections, Weights
from data_pipeline.pipeline import single_image_batch
from tests.oracle import alignps_torch, roi_torch
from tests.parity.common import MODELS, Pair, make_pair, nhwc, photo, released_pixels
from tests.parity.ours import relative_error, run_stages

SCALES = ((1500, 900), (667, 400))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("parity"))


def inputs(pair: Pair, scale: tuple[int, int]) -> tuple[tuple, Batch]:
    """A photo for the oracle (see `released_pixels`), and for us."""
    image = photo("prw" if "prw" in pair.workdir.name else "cuhk")
    for_oracle = released_pixels(image, scale)
    config = pair.config.copy_and_resolve_references()
    config.data.test_scale = scale
    batch = single_image_batch(np.ascontiguousarray(image[..., ::-1]), config.data)
    np.testing.assert_array_equal(batch.size[0], for_oracle[1])
    return for_oracle, batch


def check_detections(detections: Detections, wanted: dict[str, torch.Tensor]) -> None:
    wanted = {key: value.numpy() for key, value in wanted.items()}
    valid, count = detections.valid[0], len(wanted["scores"])
    found = {key: getattr(detections, key)[0][valid] for key in wanted}
    assert count > 20
    assert valid.sum() == count
    cosine = (found["embeddings"] * wanted["embeddings"]).sum(1)
    score_error = np.abs(found["scores"] - wanted["scores"]).max()
    box_error = np.abs(found["boxes"] - wanted["boxes"]).max()
    print(f"{count} detections: scores {score_error:.1e}, boxes {box_error:.1e} px, ", end="")
    print(f"embeddings {relative_error(found['embeddings'], wanted['embeddings']):.1e}")
    assert score_error <= 1e-4
    assert box_error <= 0.05
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"{scale[0]}x{scale[1]}")
def test_every_stage_and_the_detections(pair, scale):
    (pixels, size, factors), batch = inputs(pair, scale)
    with torch.no_grad():
        outputs, expected = pair.oracle(pixels)
        expected = {name: nhwc(value) for name, value in expected.items()}
        expected |= {key: nhwc(outputs[0][key]) for key in ("cls", "box", "centerness")}
        wanted = alignps_torch.detect(outputs[0], size, factors)

    stages, detections = run_stages(pair.model, pair.weights, pair.config.eval, batch)
    assert set(stages) == set(expected)
    errors = {}
    for name, value in expected.items():
        rows, columns = value.shape[1:3]
        errors[name] = relative_error(stages[name][:, :rows, :columns], value)
    rounded = {name: f"{error:.1e}" for name, error in errors.items()}
    print(f"\n{pair.workdir.name} {scale}: {rounded}")
    assert max(errors.values()) <= 1e-4
    check_detections(detections, wanted)


@pytest.mark.parametrize(("name", "gentle"), [("cuhk_roi", True), ("prw_roi", False)])
def test_embeddings_of_both_branches(name, gentle, tmp_path):
    pair = make_pair(name, tmp_path, gentle=gentle)
    for_oracle, batch = inputs(pair, SCALES[0])
    wanted = roi_torch.detect_with_rois(pair.oracle, *for_oracle)
    both, dense, roi = wanted.pop("embeddings"), wanted.pop("dense"), wanted.pop("roi")
    config = pair.config.eval

    @jax.jit
    def run(weights: Weights, batch: Batch) -> dict[str, Detections]:
        steps = {}
        for branch in ("both", "dense", "roi"):
            with config.unlocked():
                own = config.copy_and_resolve_references()
            own.branch = branch
            steps[branch] = PredictStep(pair.model, own)
        return {k: step(weights.params, weights.frozen, batch) for k, step in steps.items()}

    found = jax.device_get(run(pair.weights, batch))
    print(f"\n{name}")
    for branch, embeddings in {"both": both, "dense": dense, "roi": roi}.items():
        print(branch, end=": ")
        check_detections(found[branch], wanted | {"embeddings": embeddings})
