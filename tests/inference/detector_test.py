"""`Detector`: what it takes, many photos at once, what it computes in, how often it compiles."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from alignps_jax.files import write_image
from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError
from tests.gallery.painted import network_config, photo, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = network_config().unlock()
    config.model.dtype = "bfloat16"  # in training
    return write_checkpoint(tmp_path_factory.mktemp("run"), config.lock())


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.from_checkpoint(checkpoint)


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
        *(None, b"photo.jpg", [[0, 0, 0]], Image.fromarray(np.zeros((8, 8), np.uint16))),
        np.zeros((8, 8, 3), np.float32),
        *(np.zeros(shape, np.uint8) for shape in ((8, 8), (8, 8, 4), (0, 8, 3))),
    ],
)
def test_what_is_no_photo_is_one_clear_error(detector, wrong):
    for detect in (detector.detect, detector.maps, lambda x: next(detector.detect_many([x]))):
        with pytest.raises(UserError, match=r"expected .*RGB.*uint8") as error:
            detect(wrong)
        assert "\n" not in str(error.value)


def test_many_photos_are_found_as_each_alone(detector, tmp_path):
    """Landscape and portrait in turns, so that batches fill up out of order."""
    sizes = [(96, 128), (128, 96), (50, 100), (96, 128), (300, 90)]
    photos = [photo(seed, *sizes[seed * 7 % 5]) for seed in range(11)]
    write_image(tmp_path / "a.png", photos[4])
    mixed = [*photos[:4], tmp_path / "a.png", *photos[5:]]
    many = list(detector.detect_many(mixed))
    for found, one in zip(many, photos, strict=True):
        assert_same(found, detector.detect(one), atol=2e-3)
    assert list(detector.detect_many([])) == []
    found = detector.detect_many([photos[0], "nothing.jpg", photos[1]])  # it comes in its turn
    assert_same(next(found), many[0], atol=2e-3)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        next(found)


def test_embeddings_are_those_of_both_branches_or_of_one(tmp_path):
    """Of both: so that similarities are the mean of those of each."""
    config = network_config(variant="roi").unlock()
    checkpoint, found = write_checkpoint(tmp_path, config), {}
    for branch in ("both", "roi"):
        config.eval.branch = branch
        found[branch] = Detector.from_checkpoint(checkpoint, config).detect(photo(0))
    both, roi = found.values()
    assert len(both.scores) > 1
    assert_same((roi.boxes, roi.scores), (both.boxes, both.scores), rtol=1e-5)
    halves = np.split(np.asarray(both.embeddings) * np.sqrt(2), 2, axis=1)
    assert_same(halves[1], np.asarray(roi.embeddings), atol=1e-5)
    for half in halves:
        np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)


def test_the_fingerprint_is_of_the_weights(detector, tmp_path):
    same = write_checkpoint(tmp_path / "same", network_config(0.9))
    other = write_checkpoint(tmp_path / "other", network_config(), seed=1)
    assert Detector.from_checkpoint(same).fingerprint == detector.fingerprint
    assert Detector.from_checkpoint(other).fingerprint != detector.fingerprint


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
    detector, compiled = Detector.from_checkpoint(checkpoint), []
    detector.detect(photo(0))

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = list(detector.detect_many([photo(number) for number in range(5)]))
    assert (len(found), compiled) == (5, [])


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
