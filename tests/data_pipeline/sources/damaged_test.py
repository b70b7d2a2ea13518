"""Damaged annotation files: whatever is changed in one, it is read, or the error names it."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignps_jax.types import UserError
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.sources.prw import PrwSource
from data_pipeline.sources.source import LARGEST_COORDINATE
from tests.data_pipeline import dataset_fixtures as fixtures
from tests.data_pipeline.sources import coco_person_search_test, prw_test

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = st.sampled_from(["flip", "word", "cut", "remove", "repeat"])
NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1))
CHANGES = st.lists(st.tuples(st.integers(0, 5000), KINDS, NUMBERS), min_size=1, max_size=4)


def damage(data, changes):
    for place, change, value in changes:
        at = place % (len(data) + 1)
        word = at // 4 * 4
        data = {
            "flip": data[:at] + bytes([value % 256]) + data[at + 1 :],
            "word": data[:word] + struct.pack("<I", value) + data[word + 4 :],
            "cut": data[:at],
            "remove": data[:at] + data[at + value % 64 :],
            "repeat": data[: at + 8] + data[at:],
        }[change]
    return data


def check(source):
    """Reads everything, or meets an error that names the folder."""
    try:
        splits = source.train, source.test
        protocols = [source.protocol(name) for name in source.default_protocols]
    except (UserError, FileNotFoundError) as found:  # a frame of another name has no file
        assert str(source.root) in str(found)  # noqa: PT017
        return
    for split in splits:
        assert len(set(split.names)) == len(split.names)
        for name in split.names:
            assert source.root.resolve() in source.image_path(name).resolve().parents
        for boxes, ids, labeled in zip(split.boxes, split.identity, split.labeled, strict=True):
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (np.abs(boxes) <= 2 * LARGEST_COORDINATE).all()
            assert len(boxes) == len(ids) == len(labeled)
            assert (ids[labeled] >= 0).all()
    for protocol in protocols:
        for images, targets in zip(protocol.gallery, protocol.target_images, strict=True):
            assert ((images >= 0) & (images < len(splits[1].names))).all()
            assert len(targets) > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small data set for each reader."""
    cuhk, prw, coco = (tmp_path_factory.mktemp(name) for name in ("cuhk", "prw", "coco"))
    fixtures.write_small_cuhk(cuhk)
    fixtures.write_prw(prw, prw_test.TRAIN, prw_test.TEST, prw_test.QUERIES)
    for split in ("train", "test", "query"):
        fixtures.write_json(coco / f"{split}.json", coco_person_search_test.TEST)
    return {CuhkSysuSource: cuhk, PrwSource: prw, CocoPersonSearchSource: coco}


@pytest.mark.parametrize("source_class", [CuhkSysuSource, PrwSource, CocoPersonSearchSource])
@QUICK
@given(number=st.integers(0, 99), changes=CHANGES, packed=st.booleans())
def test_bytes(folders, source_class, number, changes, packed):
    """Changes of MATLAB files that are packed again are not found by a checksum."""
    root = folders[source_class]
    paths = sorted(path for path in root.rglob("*.*") if path.suffix != ".jpg")
    path = paths[number % len(paths)]
    sound = data = path.read_bytes()
    if packed and path.suffix == ".mat":
        element = zlib.compress(damage(zlib.decompress(data[136:]), changes), 1)
        data = data[:128] + struct.pack("<II", 15, len(element)) + element
    else:
        data = damage(data, changes)
    path.write_bytes(data)
    try:
        check(source_class(root))
    finally:
        path.write_bytes(sound)
