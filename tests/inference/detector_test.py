"""`Detector`: what it takes, what it computes in, and how often it compiles."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from PIL import Image

from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError
from tests.gallery.networks import network_config, photo, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = network_config().unlock()
    config.model.dtype = "bfloat16"  # in training
    return write_checkpoint(tmp_path_factory.mktemp("run"), config.lock())


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.from_checkpoint(checkpoint)


@contextlib.contextmanager
def compilations():
    """The durations of the compilations in the block."""
    found = []
    active = True

    def listen(event, seconds, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    active = False


def assert_same(found, expected, **tolerance) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_it_takes_files_pil_images_and_arrays(detector, tmp_path):
    """Files and PIL images with their EXIF orientation, as a viewer shows them."""
    pixels = photo(3)
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    turned.save(tmp_path / "a.png", exif=exif)
    expected = detector.detect(pixels)
    assert len(expected.scores)
    path = tmp_path / "a.png"
    kinds = [path, str(path), Image.open(path), Image.fromarray(pixels).convert("RGBA")]
    for found in (*map(detector.detect, kinds), *detector.detect_many(kinds)):
        assert_same(found, expected, atol=1e-5)
    assert_same(detector.maps(path).embeddings, detector.maps(pixels).embeddings, atol=1e-5)
    gray = Image.fromarray(pixels).convert("L")
    assert_same(detector.detect(gray), detector.detect(np.stack([np.asarray(gray)] * 3, axis=-1)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        None,
        b"photo.jpg",
        [[0, 0, 0]],
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        Image.fromarray(np.zeros((8, 8), np.uint16)),
    ],
)
def test_what_is_no_photo_is_one_clear_error(detector, wrong):
    for detect in (detector.detect, detector.maps, lambda x: next(detector.detect_many([x]))):
        with pytest.raises(UserError, match=r"expected .*RGB.*uint8") as error:
            detect(wrong)
        assert "\n" not in str(error.value)


def test_a_network_that_was_trained_in_bfloat16_searches_in_float32(checkpoint, detector):
    assert detector.config.model.dtype == "bfloat16"
    config = detector.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    exact = Detector.from_checkpoint(checkpoint, config)
    assert_same(detector.detect(photo(0)), exact.detect(photo(0)), rtol=0)
    config.eval.dtype = "bfloat16"  # unless the user says so
    fast = Detector.from_checkpoint(checkpoint, config).detect(photo(0))
    assert not np.array_equal(fast.scores, exact.detect(photo(0)).scores)


def test_single_photos_and_many_run_one_program_on_cpus(checkpoint):
    detector = Detector.from_checkpoint(checkpoint)
    detector.detect(photo(0))
    with compilations() as found:
        assert len(list(detector.detect_many([photo(number) for number in range(5)]))) == 5
    assert found == []


def test_compiled_programs_are_kept_unless_jax_has_a_folder_for_them(checkpoint, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        for given in (None, str(tmp_path)):
            jax.config.update("jax_compilation_cache_dir", given)
            Detector.from_checkpoint(checkpoint)
            found = jax.config.jax_compilation_cache_dir
            assert found == given if given else found
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
