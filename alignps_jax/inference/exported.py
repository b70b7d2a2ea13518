"""The detector as StableHLO programs with the weights inside, which run without this project.

`jax.export` guarantees that versions of JAX can load a program that are up to six months newer than
the one that wrote it, or up to three weeks older.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import chosen_by, load_weights
from alignps_jax.files import check_outputs, write_atomically
from alignps_jax.inference.detector import inference_model
from alignps_jax.inference.predict import PredictStep
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Batch, Detections, Weights
from data_pipeline import transforms
from data_pipeline.transforms import Size

SUFFIX = ".stablehlo"
# What a program runs on; which of them decides where it is called.
PLATFORMS = ("cpu", "cuda", "tpu")


def export_programs(checkpoint: Path, target: Path, config: ConfigDict) -> None:
    """Writes a program for landscape photos to `target`, and one for portraits beside it.

    Each takes `config.eval.batch_size` photos as evaluation sees them: uint8 RGB [B, H, W, 3], each
    resized to fit into the test scale and in the upper left corner of black; their (height, width)
    there, int32 [B, 2]; and the factors (x, y) by which they were resized, float32 [B, 2]. It
    returns a dictionary: boxes [B, K, 4] (x1, y1, x2, y2 in the photos' own pixels), scores [B, K],
    embeddings [B, K, D], best first, and which of them are valid [B, K].

    Raises:
      UserError: there is no such checkpoint, or `target` cannot be written.
    """
    files = program_files(target, config)
    check_outputs(*files)
    model = inference_model(config)
    step = PredictStep(model, config.eval)
    weights = load_weights(checkpoint, weights_template(model))
    for file, shape in files.items():
        program = _program(step, weights, config.eval.batch_size, shape)
        write_atomically(file, bytes(program.serialize()))
        print(
            f"step {int(weights.step)} of {checkpoint} (chosen by {chosen_by(checkpoint)}), for "
            f"{config.eval.batch_size} photos of {shape[0]}x{shape[1]} on {', '.join(PLATFORMS)}, "
            f"is now in {file}"
        )
    print(f"note: JAX loads it in versions up to six months newer than this one, {jax.__version__}")


def program_files(target: Path, config: ConfigDict) -> dict[Path, Size]:
    """The files of the programs, and the (height, width) that each takes."""
    shapes = transforms.buckets([config.data.test_scale])
    landscape, *portrait = sorted(shapes)
    files = {target: landscape}
    for shape in portrait:
        files[target.with_name(f"{target.stem}.portrait{SUFFIX}")] = shape
    return files


def _program(step: PredictStep, weights: Weights, photos: int, shape: Size) -> export.Exported:
    arguments = (
        jax.ShapeDtypeStruct((photos, *shape, 3), np.uint8),
        jax.ShapeDtypeStruct((photos, 2), np.int32),
        jax.ShapeDtypeStruct((photos, 2), np.float32),
    )
    detect = jax.jit(partial(_detect, step, weights))
    return export.export(detect, platforms=PLATFORMS)(*arguments)


def _detect(
    step: PredictStep,
    weights: Weights,
    photo: UInt8[Array, "B H W 3"],
    size: Int[Array, "B 2"],
    scale: Float[Array, "B 2"],
) -> dict[str, Any]:
    count = len(photo)
    nobody = jnp.zeros((count, 0), bool)
    batch = Batch(
        image=photo,
        size=size,
        scale=scale,
        index=jnp.arange(count),
        valid_image=jnp.ones(count, bool),
        boxes=jnp.zeros((count, 0, 4)),
        identity=nobody.astype(jnp.int32),
        labeled=nobody,
        valid=nobody,
    )
    found: Detections = step(weights.params, weights.frozen, batch)
    return {name: getattr(found, name) for name in ("boxes", "scores", "embeddings", "valid")}
