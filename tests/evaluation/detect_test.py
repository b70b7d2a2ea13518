"""What `--mode=detect` writes is used further: scored, read as a data set, opened as a table."""

import csv
import json
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from alignps_jax.boxes import as_stored
from alignps_jax.evaluation.detect import detect_source
from alignps_jax.evaluation.detections_io import load_detections
from alignps_jax.evaluation.scoring import evaluate_detections
from alignps_jax.types import IncompleteError, UserError
from configs import cuhk
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from tests.gallery.painted import network_config, photo, write_checkpoint
from tests.media.clips import write_clip

TURNED = 6  # by a quarter, as most phones store portraits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"), network_config())


@pytest.fixture(scope="module")
def data(run, tmp_path_factory):
    """A data set without annotations; what is found in it lies beside the photos."""
    root, cache = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cache")
    (root / "images" / "cam1").mkdir(parents=True)
    upright = Image.fromarray(photo(0))
    upright.save(root / "images" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = TURNED
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(root / "images" / "cam1" / "phone.png", exif=exif)
    Image.fromarray(photo(1)).save(cache / "0a1b2c.png")
    (root / "images" / "link.png").symlink_to(cache / "0a1b2c.png")
    write_clip(root / "images" / "v.mp4", [number / 4 for number in range(8)])
    for name in ("train.json", "people.csv", "people.npz"):
        detect_source(run, network_config(), str(root / "images"), 1.0, root / name)
    return root


PHOTOS = ["a.png", "link.png", "cam1/phone.png"]
NAMES = [PHOTOS[0], "v.mp4#t=0.000", "v.mp4#t=1.000", *PHOTOS[1:]]


def test_names_are_from_the_source_and_boxes_in_stored_pixels(data):
    saved = load_detections(data / "people.npz")
    assert list(saved.names) == NAMES
    assert saved.embeddings.shape == (len(saved.scores), network_config().model.channels)
    upright, turned = (saved.of(NAMES.index(name)) for name in ("a.png", "cam1/phone.png"))
    assert upright.stop > upright.start
    np.testing.assert_allclose(saved.scores[turned], saved.scores[upright], atol=1e-5)
    expected, _ = as_stored(saved.boxes[upright], (96, 128), TURNED)
    np.testing.assert_allclose(saved.boxes[turned], expected, atol=1e-3)
    with (data / "people.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.repeat(saved.names, np.diff(saved.offsets))
    assert [row["image"] for row in rows] == images.tolist()
    numbers = [[float(row[name]) for name in ("x1", "y1", "x2", "y2", "score")] for row in rows]
    np.testing.assert_allclose(numbers, np.c_[saved.boxes, saved.scores], atol=1e-3)


def test_the_json_is_a_data_set_and_the_npz_is_scored_on_it(data, tmp_path):
    """Somebody in two photos, as if an annotator had looked at what was found."""
    content = json.loads((data / "train.json").read_text())
    people = content["annotations"]
    first = {one["image_id"]: one for one in reversed(people) if one["image_id"] in (1, 2, 5)}
    for one in first.values():
        one["person_id"] = 17
    (data / "test.json").write_text(json.dumps(content))
    source = CocoPersonSearchSource(data)
    sizes = [(image["height"], image["width"]) for image in content["images"]]
    assert sizes == [*[(96, 128)] * 4, (128, 96)]
    for name in PHOTOS:
        with Image.open(source.image_path(name)) as image:
            assert source.photo_size(name) == image.size[::-1]
    saved = load_detections(data / "people.npz")
    np.testing.assert_allclose([one["score"] for one in people], saved.scores, atol=1e-6)
    for split in (source.train, source.test):
        assert split.names == saved.names
        np.testing.assert_allclose(np.concatenate(split.boxes), saved.boxes, atol=2e-3)
    config = cuhk.get_config()
    config.data.name, config.data.root = "coco_person_search", str(data)
    evaluate_detections(config, data / "people.npz", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["detection"] == {"recall": 1.0, "AP": 1.0}
    assert metrics["search"]["all"]["mAP"] > 0


def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys):
    detect = partial(detect_source, run, network_config(), str(tmp_path), 1.0)
    with pytest.raises(UserError, match=r"--target: suffix of .*txt: found '.txt', expected one"):
        detect(tmp_path / "people.txt")
    with pytest.raises(UserError, match="--source: found no photo or video"):
        detect(tmp_path / "people.npz")
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(IncompleteError, match="files skipped: 1 "):
        detect(tmp_path / "people.npz")
    assert "bad.jpg: cannot be decoded" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["bad.jpg"]
