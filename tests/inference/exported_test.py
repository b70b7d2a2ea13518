"""Exported programs run with JAX alone, and find what `Detector` finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax import export

from alignps_jax.inference.detector import Detector
from alignps_jax.inference.exported import PLATFORMS, export_programs
from alignps_jax.types import UserError
from configs import tiny
from data_pipeline.pipeline import single_image_batch
from tests.gallery.painted import write_checkpoint

# Runs in a process and a folder of its own, where nothing of this project can be imported.
ALONE = """
import sys
import numpy as np
from jax import export

program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
found = program.call(given["photo"], given["size"], given["scale"])
np.savez(sys.argv[3], **found)
assert not [name for name in sys.modules if name.startswith(("alignps", "data_pipeline", "flax"))]
"""


@pytest.fixture(scope="module", params=["", "roi"])
def config(request):
    config = tiny.get_config(request.param)
    config.eval.batch_size = 1
    config.eval.min_cls_score = 0.0  # an untrained network finds something, too
    return config.lock()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def target(run, config, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("programs") / "detector.stablehlo"
    export_programs(run, target, config)
    return target


def test_it_runs_without_us_and_finds_the_same(target, run, config, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (70, 120, 3), np.uint8)
    batch = single_image_batch(photo, config.data)
    given = tmp_path / "given.npz"
    np.savez(given, photo=batch.image, size=batch.size, scale=batch.scale)
    words = [sys.executable, "-c", ALONE, target, given, tmp_path / "found.npz"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=300)
    found = np.load(tmp_path / "found.npz")
    expected = Detector.from_checkpoint(run, config).detect(photo)
    assert len(expected.scores) > 10
    valid = found["valid"][0]
    for field in ("boxes", "scores", "embeddings"):
        ours = getattr(expected, field)
        np.testing.assert_allclose(found[field][0][valid], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "bucket"),
    [("detector.stablehlo", (96, 128)), ("detector.portrait.stablehlo", (128, 96))],
)
def test_it_says_what_it_takes_and_where_it_runs(target, name, bucket):
    program = export.deserialize(bytearray(target.with_name(name).read_bytes()))
    assert program.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
    shapes = [(x.dtype.name, x.shape) for x in program.in_avals]
    assert shapes == [("uint8", (1, *bucket, 3)), ("int32", (1, 2)), ("float32", (1, 2))]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(run, config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        export_programs(run, tmp_path / "file" / "detector.stablehlo", config)
