"""Detections survive the disk unchanged; what is wrong with a file is one line that names it."""

import contextlib
import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignps_jax.evaluation.detections_io import check_values, load_detections, save_detections
from alignps_jax.types import GalleryDetections, UserError
from tests.data_pipeline.sources.damaged_test import CHANGES, QUICK, damage


def make(seed=0, counts=(3, 0, 5, 1)):
    rng = np.random.default_rng(seed)
    total = sum(counts)
    corner = rng.uniform(-5, 500, (total, 2))
    embeddings = rng.normal(size=(total, 6)).astype(np.float32)
    scores = rng.uniform(size=total).astype(np.float32)
    image = np.repeat(np.arange(len(counts)), counts)
    return GalleryDetections(
        names=tuple(f"s{i} ä.jpg" for i in range(len(counts))),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.hstack([corner, corner + rng.uniform(0, 90, (total, 2))]).astype(np.float32),
        scores=scores[np.lexsort((-scores, image))],
        embeddings=embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
    )


def arrays(detections):
    parts = dataclasses.asdict(detections)
    return {"image_names": np.array(parts.pop("names"), dtype=np.str_), **parts}


def assert_same(a, b):
    for name, left in arrays(a).items():
        right = arrays(b)[name]
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


ZEROS = dataclasses.replace(make(), embeddings=np.zeros((9, 6), np.float32))
TIED = dataclasses.replace(make(), scores=np.full(9, 0.5, np.float32))


@pytest.mark.parametrize(
    "detections", [make(), make(counts=(0, 0)), make(counts=(1,)), make(counts=()), ZEROS, TIED]
)
def test_round_trip_is_bit_for_bit(tmp_path, detections):
    save_detections(tmp_path / "d.npz", detections)
    assert_same(load_detections(tmp_path / "d.npz"), detections)


def test_foreign_file_is_sorted_and_normalized(tmp_path):
    detections = make(counts=(4, 0, 6))
    rng = np.random.default_rng(1)
    shuffle = np.concatenate([rng.permutation(4), 4 + rng.permutation(6)])
    raw = arrays(detections)
    raw |= {name: raw[name][shuffle] for name in ("boxes", "scores", "embeddings")}
    raw["embeddings"] = np.asfortranarray(raw["embeddings"] * rng.uniform(0.01, 50, (10, 1)), ">f8")
    raw["offsets"] = raw["offsets"].astype(np.float32)
    np.savez_compressed(tmp_path / "d.npz", comment=np.array([{}]), **raw)
    loaded = load_detections(tmp_path / "d.npz")
    np.testing.assert_allclose(loaded.embeddings, detections.embeddings, atol=1e-7)
    assert_same(dataclasses.replace(loaded, embeddings=detections.embeddings), detections)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores", None, "is no archive .*scores"),
        ("image_names", np.array(["a", None], dtype=object), "is no archive .*allow_pickle"),
        ("image_names", np.array(["a", "b", "a", "c"]), "image_names: found 'a' twice"),
        ("image_names", np.array(["a", "b"]), r"offsets: found the shape \(5,\), .*\(3,\)"),
        ("offsets", np.array([0, 3, 2, 8, 9]), "offsets: found 0 to 9, expected 0 to 9"),
        ("offsets", np.array([0, 3, 3, 8, 8]), "offsets: found 0 to 8, expected 0 to 9"),
        ("scores", np.zeros((9, 1)), r"scores: found the shape \(9, 1\), expected \(9,\)"),
        ("scores", np.array(["x"] * 9), "is no archive .*float"),
        ("scores", np.full(9, np.inf), "found 9 scores .* finite, the first in image 's0"),
        ("embeddings", np.ones((7, 6)), r"embeddings: found the shape \(7, 6\)"),
        ("embeddings", np.full((9, 6), 1e300), "found 9 embeddings that are not finite"),
        ("boxes", np.tile([1, np.nan, 5, 7], (9, 1)), "found 9 boxes that are not finite"),
        ("boxes", np.tile([9, 0, 5, 7], (9, 1)), "found 9 boxes with x2 < x1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arrays_that_do_not_fit_are_one_line(tmp_path, name, value, message):
    raw = arrays(make()) | {name: value}
    np.savez(tmp_path / "d.npz", **{key: each for key, each in raw.items() if each is not None})
    with pytest.raises(UserError, match=rf"d\.npz: {message}") as error:
        load_detections(tmp_path / "d.npz")
    assert "\n" not in str(error.value)


def test_what_the_system_says_is_said_in_its_own_words(tmp_path):
    """Nothing of this is damage."""
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        load_detections(tmp_path / "absent.npz")
    with pytest.raises(IsADirectoryError, match=r"folder\.npz"):
        load_detections(tmp_path / "folder.npz")
    with pytest.raises(OSError, match="Input/output error"):
        load_detections(Path("/proc/self/mem"))
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**45, 3)}
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        for name in arrays(make()):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(MemoryError, match="Unable to allocate"):
        load_detections(tmp_path / "large.npz")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "d.npz"
    save_detections(path, make())
    return path, path.read_bytes()


@QUICK
@given(changes=CHANGES, number=st.none() | st.integers(0, 4))
def test_damaged_bytes_are_read_or_one_line(saved, changes, number):
    """Those of one array, whose checksum is then right, or any byte of the archive."""
    path, sound = saved
    if number is None:
        path.write_bytes(damage(sound, changes))
    else:
        with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(path, "w") as new:
            for place, name in enumerate(old.namelist()):
                data = old.read(name)
                new.writestr(name, damage(data, changes) if place == number else data)
    with contextlib.suppress(UserError, MemoryError):
        found = load_detections(path)
        check_values(found)
        lengths = np.linalg.norm(found.embeddings.astype(np.float64), axis=1)
        assert (np.isclose(lengths, 1, atol=1e-5) | (lengths == 0)).all()
        assert len(found.scores) == found.offsets[-1]
