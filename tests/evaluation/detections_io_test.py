"""Detections survive the disk unchanged; every broken file is refused in one line."""

import dataclasses
import zipfile

import numpy as np
import pytest

from alignps_jax.evaluation.detections_io import (
    align_detections,
    check_detections,
    load_detections,
    save_detections,
)
from alignps_jax.types import GalleryDetections, UserError


def make(seed=0, counts=(3, 0, 5, 1)):
    rng = np.random.default_rng(seed)
    total = sum(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    corner = rng.uniform(-5, 500, (total, 2))
    embeddings = rng.normal(size=(total, 6)).astype(np.float32)
    scores = rng.uniform(size=total).astype(np.float32)
    image = np.repeat(np.arange(len(counts)), counts)
    return GalleryDetections(
        names=tuple(f"s{i} ä.jpg" for i in range(len(counts))),
        offsets=offsets,
        boxes=np.hstack([corner, corner + rng.uniform(0, 90, (total, 2))]).astype(np.float32),
        scores=scores[np.lexsort((-scores, image))],
        embeddings=embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
    )


def arrays(detections):
    return {
        "image_names": np.array(detections.names, dtype=np.str_),
        "offsets": detections.offsets,
        "boxes": detections.boxes,
        "scores": detections.scores,
        "embeddings": detections.embeddings,
    }


def assert_same(a, b):
    assert a.names == b.names
    for field in ("offsets", "boxes", "scores", "embeddings"):
        left, right = getattr(a, field), getattr(b, field)
        assert left.dtype == right.dtype, field
        np.testing.assert_array_equal(left, right, err_msg=field)


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0), (1,), ()])
def test_round_trip_is_bit_for_bit(tmp_path, counts):
    detections = make(counts=counts)
    save_detections(tmp_path / "d.npz", detections)
    assert_same(load_detections(tmp_path / "d.npz"), detections)
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


def test_foreign_file_is_sorted_and_normalized(tmp_path):
    detections = make(counts=(4, 0, 6))
    rng = np.random.default_rng(1)
    shuffle = np.concatenate([rng.permutation(4), 4 + rng.permutation(6)])
    scale = rng.uniform(0.01, 50, (10, 1))
    raw = arrays(detections)
    raw |= {name: raw[name][shuffle] for name in ("boxes", "scores", "embeddings")}
    raw["embeddings"] = (raw["embeddings"] * scale).astype(np.float64)
    raw["offsets"] = raw["offsets"].astype(np.int32)
    np.savez_compressed(tmp_path / "d.npz", comment="ignored", **raw)
    loaded = load_detections(tmp_path / "d.npz")
    np.testing.assert_array_equal(loaded.scores, detections.scores)
    np.testing.assert_array_equal(loaded.boxes, detections.boxes)
    np.testing.assert_allclose(loaded.embeddings, detections.embeddings, atol=1e-7)
    assert loaded.embeddings.dtype == np.float32
    assert loaded.offsets.dtype == np.int64
    np.testing.assert_allclose(np.linalg.norm(loaded.embeddings, axis=1), 1, atol=1e-6)


def test_tied_scores_keep_the_order_of_the_file(tmp_path):
    detections = dataclasses.replace(make(), scores=np.full(9, 0.5, np.float32))
    save_detections(tmp_path / "d.npz", detections)
    assert_same(load_detections(tmp_path / "d.npz"), detections)


def put(field, index, value):
    def change(raw):
        raw[field] = raw[field].copy()
        raw[field][index] = value

    return change


def replace(field, value):
    def change(raw):
        raw[field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("scores"), "'scores' is missing"),
        (lambda raw: raw.pop("image_names"), "'image_names' is missing"),
        (replace("image_names", np.array([1, 2, 3, 4])), "'image_names' is int64"),
        (replace("image_names", np.array(["a", None], dtype=object)), "'image_names' cannot be"),
        (replace("image_names", np.array(["a", "b", "a", "c"])), "'a' occurs twice"),
        (replace("image_names", np.array(["a", "b"])), r"offsets has shape \(5,\).*\(3,\)"),
        (replace("offsets", np.array([0.0, 3, 3, 8, 9])), "'offsets' is float64"),
        (replace("offsets", np.array([0, 3, 2, 8, 9])), "offsets fall from 3 to 2 at image 's1"),
        (replace("offsets", np.array([1, 3, 3, 8, 9])), "run from 1 to 9; expected 0 to 9"),
        (replace("offsets", np.array([0, 3, 3, 8, 8])), "run from 0 to 8; expected 0 to 9"),
        (replace("boxes", np.zeros((9, 5))), r"boxes has shape \(9, 5\); expected \(9, 4\)"),
        (replace("boxes", np.zeros((8, 4))), r"boxes has shape \(8, 4\); expected \(9, 4\)"),
        (replace("scores", np.zeros((9, 1))), r"'scores' is float64 of shape \(9, 1\)"),
        (replace("scores", np.array(["x"] * 9)), "'scores' is <U1"),
        (replace("embeddings", np.ones((7, 6))), r"embeddings has shape \(7,\); expected \(9,\)"),
        (replace("embeddings", np.ones((9, 0))), r"embeddings has shape \(9, 0\)"),
        (  # steps of more than 63 bits, which add up to nine
            replace("offsets", np.array([0, 2**63 - 1, -2, 2**63 - 3, 9])),
            "offsets fall from 9223372036854775807 to -2",
        ),
        (replace("image_names", np.full(4, 0x7FFFFFFF, "<u4").view("<U1")), "what is no text"),
        (put("boxes", (4, 1), np.nan), "boxes has a value that is not finite at row 4 .*'s2"),
        (put("boxes", (4, 2), -100), "boxes has a box with x2 < x1"),
        (put("scores", 8, np.inf), "scores has a value that is not finite at row 8 .*'s3"),
        (put("embeddings", (0, 3), np.nan), "embeddings has a value that is not finite"),
        (put("embeddings", 3, 0.0), "embeddings has an embedding of zeros at row 3 .*'s2"),
        (replace("embeddings", np.full((9, 6), 1e300)), "embeddings has a value that is not fin"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_broken_arrays_are_refused(tmp_path, change, message):
    raw = arrays(make())
    change(raw)
    path = tmp_path / "d.npz"
    np.savez(path, **raw)
    with pytest.raises(UserError, match=message) as error:
        load_detections(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_files_are_refused(tmp_path):
    save_detections(tmp_path / "good.npz", make())
    content = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"embeddings.npy") + 200] ^= 0xFF
    cases = {
        "empty.npz": b"",
        "text.npz": b"not an archive",
        "pickle.npz": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07payload\x94.",
        "truncated.npz": content[: len(content) // 2],
        "flipped.npz": bytes(flipped),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("image_names", "not an array")
    (tmp_path / "folder.npz").mkdir()
    for name in [*cases, "array.npy", "other.npz", "folder.npz", "absent.npz"]:
        with pytest.raises(UserError, match=name) as error:
            load_detections(tmp_path / name)
        assert "\n" not in str(error.value)


def test_nothing_invalid_is_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "d.npz"
    save_detections(path, make())
    before = path.read_bytes()
    broken = dataclasses.replace(make(), scores=np.full(9, np.nan, np.float32))
    with pytest.raises(UserError, match="scores"):
        save_detections(path, broken)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="does not exist"):
        save_detections(tmp_path / "no" / "d.npz", make())


def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    save_detections(path, make())
    before = path.read_bytes()

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(UserError, match=r"d\.npz: cannot be written \(No space"):
        save_detections(path, make(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_align_reorders_leaves_out_and_names_the_missing():
    detections = make(counts=(3, 0, 5, 1))
    names = [detections.names[i] for i in (3, 2, 1)]
    aligned = align_detections(detections, names, "d.npz")
    assert aligned.names == tuple(names)
    assert aligned.offsets.tolist() == [0, 1, 6, 6]
    for new, old in enumerate((3, 2, 1)):
        for field in ("boxes", "scores", "embeddings"):
            np.testing.assert_array_equal(
                getattr(aligned, field)[aligned.of(new)],
                getattr(detections, field)[detections.of(old)],
            )
    check_detections(aligned, "aligned")
    assert align_detections(detections, detections.names, "d.npz") is detections
    with pytest.raises(UserError, match=r"d\.npz: image 'lost' has no entry among the 4 images"):
        align_detections(detections, [detections.names[0], "lost", "gone"], "d.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.full((9, 6), np.nan, np.float32)}, r"embeddings .*not finite.*s0"),
        ({"scores": np.array([0.5] * 4 + [np.inf] * 5, np.float32)}, r"scores .*not finite.*s2"),
        ({"embeddings": make().embeddings * 2}, "length other than one at row 0"),
        ({"offsets": np.array([0, 1, 2, 9])}, "offsets has shape"),
    ],
)
def test_invalid_detections_are_refused(change, message):
    with pytest.raises(UserError, match=f"^network: .*{message}") as error:
        check_detections(dataclasses.replace(make(), **change), "network")
    assert "\n" not in str(error.value)
