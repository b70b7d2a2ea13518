"""The detector as StableHLO programs with the weights inside, which run without this project."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax import export
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.checkpoint.store import load_weights
from alignps_jax.files import check_outputs, write_atomically
from alignps_jax.inference.predict import PredictStep, inference_model
from alignps_jax.nn.model import weights_template
from alignps_jax.nn.platforms import for_every_platform
from data_pipeline import transforms

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
# What it says of a map's layout on TPUs is no part of StableHLO, but XLA has always known it.
LAYOUTS = (export.DisabledSafetyCheck.custom_call("LayoutConstraint"),)


def export_programs(checkpoint: Path, target: Path, config: ConfigDict) -> None:
    """Writes a program for landscape photos to `target`, and one for portraits beside it.

    Each takes `config.eval.batch_size` photos as evaluation sees them: uint8 RGB [B, H, W, 3], each
    resized to fit into the test scale and in the upper left corner of black; their (height, width)
    there, int32 [B, 2]; and the factors (x, y) by which they were resized, float32 [B, 2]. It
    returns a dictionary: boxes [B, K, 4] (x1, y1, x2, y2 in the photos' own pixels), scores [B, K],
    embeddings [B, K, D], best first, and which of them are valid [B, K]. UserError if there is no
    such checkpoint, or `target` is a folder.
    """
    shapes = sorted(transforms.buckets([config.data.test_scale]))
    targets = (target, target.with_name(f"{target.stem}.portrait{SUFFIX}"))
    files = dict(zip(targets, shapes, strict=False))  # one where the test scale is square
    check_outputs(*files)
    step = PredictStep(inference_model(config), config.eval)
    folder, by = chosen_step(checkpoint, config)
    weights = load_weights(folder, weights_template(step.model))
    photos = config.eval.batch_size

    def detect(
        photo: UInt8[Array, "B H W 3"], size: Int[Array, "B 2"], scale: Float[Array, "B 2"]
    ) -> dict[str, Array]:
        nobody = transforms.empty_batch(photos, (photo.shape[1], photo.shape[2]), 0)
        batch = dataclasses.replace(nobody, image=photo, size=size, scale=scale)
        return dict(vars(step(weights.params, weights.frozen, batch)))

    for file, shape in files.items():
        like = transforms.empty_batch(photos, shape, 0)
        with for_every_platform():
            exported = export.export(jax.jit(detect), platforms=PLATFORMS, disabled_checks=LAYOUTS)
            program = exported(like.image, like.size, like.scale)
        write_atomically(file, bytes(program.serialize()))
        print(
            f"step {int(weights.step)} of {checkpoint} (chosen by {by}), for batches of {photos} "
            f"at {shape[0]}x{shape[1]} pixels on {', '.join(PLATFORMS)}, is now in {file}"
        )
    print(f"note: JAX loads it in versions up to six months newer than this one, {jax.__version__}")
