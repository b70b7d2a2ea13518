"""Writes tests/golden/*.npz: what the PyTorch oracle says, for the tests that run without PyTorch.

.venv-parity/bin/python -m tests.oracle.make_golden

The weights are not stored: `random_weights.py` draws them again from NumPy's generator.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.oracle import alignps_torch, golden
from tests.oracle.training_torch import Trainer, remember
from tests.parity.common import nhwc, scene_for_oracle


def oracle(name: str, gentle: bool) -> alignps_torch.AlignPS:
    spec = alignps_torch.spec_of(name, **golden.WIDTHS, **golden.MEMORY)
    return alignps_torch.random_model(spec, gentle)


def inference(name: str) -> dict[str, np.ndarray]:
    """The outputs and detections of one image."""
    with torch.no_grad():
        pixels, _ = scene_for_oracle(golden.scenes()[0])
        outputs, stages = oracle(name, gentle=False)(pixels[:1])
        detections = alignps_torch.detect(outputs[0], golden.SIZE, (1.0, 1.0))
    arrays = {key: nhwc(outputs[0][key]) for key in ("cls", "box", "centerness")}
    arrays |= {key: nhwc(stages[key]) for key in ("C5", "lateral5", "P3")}
    return arrays | {f"detected_{key}": value.numpy() for key, value in detections.items()}


def training(name: str) -> dict[str, np.ndarray]:
    """Memory before training, losses and gradient norms of steps, all that training made.

    In float64: rounding is then on one side of the comparison only.
    """
    model = oracle(name, gentle=True).double()
    batches = [scene_for_oracle(scene, "float64") for scene in golden.scenes()]
    remember(model, batches)
    state = model.state_dict()
    arrays = {
        f"before/{key}": x.clone().numpy() for key, x in state.items() if "matching_layer" in key
    }
    trainer = Trainer(model, **golden.RULES)
    for step in range(golden.STEPS):
        terms = trainer.step(*batches[step % len(batches)])
        arrays |= {f"loss/{step}/{key}": np.float32(value) for key, value in terms.items()}
        if step == 0:
            norms = {key: value.norm() for key, value in trainer.gradients.items()}
            arrays |= {f"gradient/{key}": np.float32(norm) for key, norm in norms.items()}
    # Kernels are long: their norm and first element will do.
    for key, value in model.state_dict().items():
        summary = torch.stack([value.norm(), value.flatten()[0]]) if value.ndim == 4 else value
        if ".bn" not in key and "downsample.1" not in key:
            arrays[f"after/{key}"] = summary.numpy()
    return {
        key: np.float32(value) if value.dtype == np.float64 else value
        for key, value in arrays.items()
    }


if __name__ == "__main__":
    golden.FOLDER.mkdir(exist_ok=True)
    for kind, names in ((inference, golden.INFERENCE), (training, golden.TRAINING)):
        for name in names:
            np.savez_compressed(golden.FOLDER / f"{kind.__name__}_{name}.npz", **kind(name))
