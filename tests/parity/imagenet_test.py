"""torchvision's own ResNet-50 against ours, from its file to C5 (`make parity`)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="make parity runs these")
pytest.importorskip("torchvision", reason="make parity runs these")

import torch
from flax import traverse_util
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional

from alignps_jax.nn.model import build_model
from alignps_jax.training.pretrained import starting_arrays, starting_config
from configs import cuhk
from tests.oracle.random_weights import random_state_dict
from tests.parity.common import nhwc
from tests.parity.ours import relative_error


def test_torchvision_weights_and_pixels(tmp_path):
    theirs = resnet50(weights=None).eval()
    prefix = "backbone."
    shapes = {prefix + name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    weights = random_state_dict(shapes, 4)
    theirs.load_state_dict(
        {name.removeprefix(prefix): torch.from_numpy(value) for name, value in weights.items()}
    )
    torch.save(theirs.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    config = cuhk.get_config()

    image = np.random.default_rng(5).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    pixels = functional.normalize(
        functional.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    stages = create_feature_extractor(theirs, {"layer2": "C3", "layer3": "C4", "layer4": "C5"})
    with torch.no_grad():
        expected = stages(pixels[None])

    config.model.pretrained = str(tmp_path / "resnet50-0676ba61.pth")
    config = starting_config(config, tmp_path)
    model = build_model(config)
    ours = traverse_util.unflatten_dict(starting_arrays(config, model), sep="/")
    variables = {name: tree["backbone"] for name, tree in ours.items()}
    size = np.array([image.shape[:2]], np.int32)

    @jax.jit
    def run(variables):
        return model.backbone.apply(variables, model.normalized(image[None], size), size)

    for (level, wanted), found in zip(expected.items(), run(variables), strict=True):
        error = relative_error(found, nhwc(wanted))
        print(f"\ntorchvision ResNet-50 {level}: {error:.1e}")
        assert error <= 1e-4
