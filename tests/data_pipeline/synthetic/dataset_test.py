"""The synthetic data set: layout on disk, protocol, drawing, and what is refused."""

import dataclasses
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import scipy.io

from alignps_jax.types import UserError
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.synthetic import dataset as synthetic
from data_pipeline.synthetic import scenes as synthetic_scenes
from data_pipeline.synthetic.canvas import Sprite
from data_pipeline.synthetic.dataset import SyntheticSpec, write_synthetic
from data_pipeline.synthetic.figures import draw_person
from data_pipeline.synthetic.people import (
    describe_all,
    sample_appearances,
    sample_pose,
    sample_stranger,
)
from tests.places import ROOT

REAL_PROTOCOL = ROOT.parent / "shared/data/TestG100.mat"
SPEC = SyntheticSpec(
    seed=3,
    train_images=24,
    test_images=102,
    train_identities=13,
    test_identities=11,
    height=120,
    width=168,
)
TINY = dataclasses.replace(
    SPEC, train_images=9, test_images=7, train_identities=5, test_identities=4
)

FOLDER = "annotation/test/train_test"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "synthetic"
    write_synthetic(folder, TINY)
    return folder


def _load(root, file, name):
    return scipy.io.loadmat(root / file)[name]


def _boxes(root):
    """Image name -> boxes (x, y, w, h), read the way the published loaders index the array."""
    images = _load(root, "annotation/Images.mat", "Img").squeeze()
    return {
        str(name[0]): np.array([box[0].ravel() for box in boxes[0]]).astype(int)
        for name, _, boxes in images
    }


def _train_scenes(root):
    """Identity name -> (image name, box) of its training photos."""
    train = _load(root, f"{FOLDER}/Train.mat", "Train").squeeze()
    return {
        str(person[0, 0][0][0]): [
            (str(name[0]), tuple(box.ravel().astype(int)))
            for name, box, _ in person[0, 0][2].squeeze()
        ]
        for person in train
    }


def _protocol(root, size):
    """(identity, query image, query box, [(image, box or None), ...]) of every query."""
    rows = _load(root, f"{FOLDER}/TestG{size}.mat", f"TestG{size}").squeeze()
    queries = []
    for row in rows:
        image, box, _, identity = row["Query"][0, 0]
        gallery = [
            (str(name[0]), tuple(place.ravel().astype(int)) if place.size else None)
            for name, place, _ in row["Gallery"].squeeze()
        ]
        queries.append((str(identity[0]), str(image[0]), tuple(box.ravel().astype(int)), gallery))
    return queries


def _nesting(value):
    """How a loaded value is built: shapes with N for lengths, fields, kinds of the leaves."""
    if isinstance(value, np.ndarray) and (value.dtype.names or value.dtype == object):
        shape = tuple("N" if length > 1 else length for length in value.shape)
        fields = value.dtype.names
        inside = [_nesting(element) for element in value.ravel()]
        return shape, fields, tuple(sorted({repr(element) for element in inside}))
    if isinstance(value, np.void):
        return tuple(_nesting(value[field]) for field in value.dtype.names)
    return value.dtype.kind, value.shape


def test_files_on_disk(root):
    names = sorted(path.name for path in (root / "Image/SSM").iterdir())
    count = SPEC.train_images + SPEC.test_images
    assert names == [f"s{index + 1:05d}.jpg" for index in range(count)]
    assert {path.name for path in (root / FOLDER).iterdir()} == {
        "Train.mat",
        "TestG50.mat",
        "TestG100.mat",
    }
    image = cv2.imread(str(root / "Image/SSM" / names[0]))
    assert image.shape == (SPEC.height, SPEC.width, 3)


def test_nesting_of_image_and_train_files(root):
    images = _load(root, "annotation/Images.mat", "Img")
    assert images.shape == (1, SPEC.train_images + SPEC.test_images)
    assert images.dtype.names == ("imname", "nAppear", "box")
    first = images[0, 0]
    assert first["box"].dtype.names == ("idlocate", "ishard")
    assert first["box"].shape == (1, first["nAppear"][0, 0])
    assert first["box"][0, 0]["idlocate"].shape == (1, 4)
    pool = _load(root, "annotation/pool.mat", "pool")
    assert pool.shape == (SPEC.test_images, 1)
    assert pool[0, 0].shape == (1,)
    assert pool[0, 0].dtype.kind == "U"
    train = _load(root, f"{FOLDER}/Train.mat", "Train")
    assert train.shape == (SPEC.train_identities, 1)
    person = train[0, 0]
    assert person.shape == (1, 1)
    assert person.dtype.names == ("idname", "nAppear", "scene")
    assert person[0, 0]["scene"].dtype.names == ("imname", "idlocate", "ishard")
    assert person[0, 0]["scene"].shape == (1, person[0, 0]["nAppear"][0, 0])


@pytest.mark.skipif(not REAL_PROTOCOL.exists(), reason="needs the real TestG100.mat")
def test_protocol_is_nested_like_the_real_one(root):
    ours = _load(root, f"{FOLDER}/TestG100.mat", "TestG100")
    real = scipy.io.loadmat(REAL_PROTOCOL)["TestG100"][:, :40]
    assert _nesting(ours) == _nesting(real)


@pytest.mark.parametrize("size", [50, 100])
def test_gallery_starts_with_every_photo_of_the_person(root, size):
    boxes = _boxes(root)
    pool = [str(name[0]) for name in _load(root, "annotation/pool.mat", "pool").ravel()]
    holding = {}
    for identity, image, box, gallery in _protocol(root, 100):
        found = {(name, place) for name, place in gallery if place is not None}
        holding.setdefault(identity, set()).update(found | {(image, box)})
    # 102 photos hold 5 + 6 + 5 + 4 + 6 + 5 identities per six of them, at most 40 photos each.
    assert sum(len(places) for places in holding.values()) == min(102 // 6 * 31, 11 * 40)
    queries = _protocol(root, size)
    assert len(queries) == 2 * SPEC.test_identities
    assert len({(identity, image) for identity, image, _, _ in queries}) == len(queries)
    for identity, image, box, gallery in queries:
        names = [name for name, _ in gallery]
        found = [(name, place) for name, place in gallery if place is not None]
        assert len(names) == len(set(names)) == size
        assert set(names) <= set(pool) - {image}
        assert gallery[: len(found)] == found
        assert set(found) == holding[identity] - {(image, box)}
        assert len(found) >= 3
        for name, place in [*found, (image, box)]:
            assert (boxes[name] == place).all(axis=1).sum() == 1


def test_smaller_galleries_are_part_of_larger_ones(root):
    for small, large in zip(_protocol(root, 50), _protocol(root, 100), strict=True):
        assert small[:3] == large[:3]
        assert set(small[3]) <= set(large[3])


def test_training_and_test_people_and_photos_are_disjoint(root):
    train = _train_scenes(root)
    pool = {str(name[0]) for name in _load(root, "annotation/pool.mat", "pool").ravel()}
    assert len(train) == SPEC.train_identities
    assert not set(train) & {identity for identity, *_ in _protocol(root, 50)}
    assert not pool & {name for scenes in train.values() for name, _ in scenes}
    counts = [len({name for name, _ in scenes}) for scenes in train.values()]
    assert min(counts) >= 5
    assert max(counts) - min(counts) <= 1
    boxes = _boxes(root)
    for scenes in train.values():
        for name, box in scenes:
            assert (boxes[name] == box).all(axis=1).sum() == 1


def test_boxes_lie_in_the_photo_and_sizes_vary(root):
    boxes = _boxes(root)
    counts = [len(rows) for rows in boxes.values()]
    assert min(counts) >= 4
    assert max(counts) <= 7
    every = np.concatenate(list(boxes.values()))
    assert (every[:, :2] >= 0).all()
    assert (every[:, 2:] > 0).all()
    assert (every[:, 0] + every[:, 2] <= SPEC.width).all()
    assert (every[:, 1] + every[:, 3] <= SPEC.height).all()
    heights = np.sort(every[:, 3])
    assert heights[-1] / heights[0] >= 4
    # Some people have no identity, most have one.
    labeled = sum(len(scenes) for scenes in _train_scenes(root).values())
    in_training = sum(counts[: SPEC.train_images])
    assert 0.6 * in_training < labeled < in_training


def test_reader_finds_everybody(root):
    source = CuhkSysuSource(root)
    assert source.train.num_identities == SPEC.train_identities
    assert source.test.num_identities == SPEC.test_identities
    assert source.protocols == ("TestG50", "TestG100", "all")
    labeled = sum(int(mask.sum()) for mask in source.train.labeled)
    assert labeled == sum(len(scenes) for scenes in _train_scenes(root).values())


def test_torso_color_belongs_to_the_identity(root):
    colors, identities = [], []
    for identity, scenes in _train_scenes(root).items():
        for name, (x, y, w, h) in scenes:
            if h < 0.2 * SPEC.height:
                continue
            image = cv2.cvtColor(cv2.imread(str(root / "Image/SSM" / name)), cv2.COLOR_BGR2Lab)
            torso = image[y + h // 4 : y + h // 2, x + w // 4 : x + w - w // 4]
            colors.append(torso.reshape(-1, 3).astype(float).mean(axis=0))
            identities.append(identity)
    distance = np.linalg.norm(np.subtract.outer(colors, colors).diagonal(axis1=1, axis2=3), axis=2)
    same = np.equal.outer(identities, identities)
    other = ~same
    np.fill_diagonal(same, False)
    assert distance[same].mean() < 0.75 * distance[other].mean()
    # The light and the pose change it all the same.
    assert distance[same].mean() > 5


def test_identities_look_unlike_each_other_and_unlike_strangers():
    rng = np.random.default_rng(0)
    people = sample_appearances(rng, 30)
    known = describe_all(people)
    random = describe_all(tuple(sample_appearances(rng, 1)[0] for _ in range(30)))

    def nearest(rows):
        distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        return (distances + 9 * np.eye(len(rows))).min(axis=1)

    assert nearest(known).min() > nearest(random).min()
    strangers = describe_all(tuple(sample_stranger(rng, known) for _ in range(10)))
    assert np.linalg.norm(strangers[:, None] - known[None], axis=2).min() > 0.2


def test_figures_stay_inside_their_canvas():
    rng = np.random.default_rng(1)
    for person in sample_appearances(rng, 40):
        sprite = draw_person(person, sample_pose(rng), rng)
        assert 190 < sprite.alpha.shape[0] < 285
        assert sprite.alpha.shape[1] < 225
        assert not sprite.color[sprite.alpha == 0].any()


def test_visible_share_and_owner_of_overlapping_cutouts():
    def item(height, width, x, y, depth, person=True):
        sprite = Sprite(
            np.zeros((height, width, 3), np.uint8), np.full((height, width), 255, np.uint8)
        )
        return synthetic_scenes._Item(sprite, x, y, depth, person)

    # The nearest item is a thing; the first person is partly behind it, the second half outside.
    items = [item(10, 8, 4, 5, 1.0), item(6, 4, 10, 7, 9.0, False), item(12, 6, -3, 20, 2.0)]
    owners = synthetic_scenes._owners(items, 40, 30)
    expected = np.full((40, 30), -1)
    expected[5:15, 4:12] = 0
    expected[20:32, 0:3] = 2
    expected[7:13, 10:14] = 1
    np.testing.assert_array_equal(owners, expected)
    shares = synthetic_scenes._visible_shares(items, owners)
    np.testing.assert_allclose(shares, [(80 - 12) / 80, 0.5])


def test_people_are_never_mostly_hidden():
    people = sample_appearances(np.random.default_rng(2), 6)
    for seed in range(15):
        scene = synthetic_scenes.draw_scene(people, 160, 208, np.random.default_rng(seed))
        assert scene.image.dtype == np.uint8
        assert len(scene.boxes) == 6
        assert (scene.visible >= synthetic_scenes.MIN_VISIBLE).all()


def test_the_same_seed_draws_the_same_bytes(tiny, tmp_path):
    write_synthetic(tmp_path / "again", TINY)
    write_synthetic(tmp_path / "other", dataclasses.replace(TINY, seed=TINY.seed + 1))
    for image in (tiny / "Image/SSM").iterdir():
        assert image.read_bytes() == (tmp_path / "again/Image/SSM" / image.name).read_bytes()
        assert image.read_bytes() != (tmp_path / "other/Image/SSM" / image.name).read_bytes()
    assert _train_scenes(tiny) == _train_scenes(tmp_path / "again")
    assert _protocol(tiny, 50) == _protocol(tmp_path / "again", 50)
    assert _protocol(tiny, 50) != _protocol(tmp_path / "other", 50)


def test_a_photo_does_not_depend_on_the_others(tiny, tmp_path):
    people = sample_appearances(
        synthetic._generator(TINY, synthetic._PEOPLE), TINY.train_identities + TINY.test_identities
    )
    train, _ = synthetic._plans(TINY)
    synthetic._draw_photo(tmp_path, 6, train[6], people, describe_all(people), TINY)
    alone = (tmp_path / "s00007.jpg").read_bytes()
    assert alone == (tiny / "Image/SSM/s00007.jpg").read_bytes()


def test_few_test_photos_give_one_gallery_of_all_others(tiny):
    assert not (tiny / FOLDER / "TestG100.mat").exists()
    assert {len(gallery) for *_, gallery in _protocol(tiny, 50)} == {TINY.test_images - 1}


def test_few_identities_in_many_photos_leave_room_for_distractors(tmp_path):
    spec = dataclasses.replace(TINY, test_images=60, test_identities=2, height=64, width=64)
    write_synthetic(tmp_path / "set", spec)
    for *_, gallery in _protocol(tmp_path / "set", 50):
        assert len(gallery) == 50
        assert sum(place is not None for _, place in gallery) == 39
    # The other photos show passers-by only.
    assert min(len(rows) for rows in _boxes(tmp_path / "set").values()) >= 3


def test_existing_set_is_kept_and_anything_else_is_refused(tiny, tmp_path, capsys):
    before = (tiny / "synthetic.json").stat().st_mtime_ns
    write_synthetic(tiny, TINY)
    assert (tiny / "synthetic.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"synthetic\.json: found .*expected .*config\.data\.root"):
        write_synthetic(tiny, dataclasses.replace(TINY, seed=8))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"photos: found something without synthetic\.json"):
        write_synthetic(tmp_path / "photos", TINY)
    (tmp_path / "photos/synthetic.json").write_bytes(b"\xff{\n")
    with pytest.raises(UserError, match="expected") as caught:
        write_synthetic(tmp_path / "photos", TINY)
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: found something"):
        write_synthetic(tmp_path / "file", TINY)
    (tmp_path / "empty").mkdir()
    assert capsys.readouterr().out == ""
    write_synthetic(tmp_path / "empty", TINY)  # as for a folder that is not there: it may be a typo
    assert f"found no scenes in {tmp_path / 'empty'}, drawing" in capsys.readouterr().out
    assert (tmp_path / "empty/annotation/Images.mat").is_file()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("train_images", 0),
        ("train_images", 5),
        ("test_images", 3),
        ("train_identities", 0),
        ("test_identities", -2),
        ("test_identities", 500),
        ("height", 63),
        ("width", 0),
    ],
)
def test_impossible_specs_are_refused(tmp_path, field, value):
    named = "test_images" if value == 500 else field
    with pytest.raises(UserError, match=rf"^config\.data\.synthetic\.{named}: found .*expected"):
        write_synthetic(tmp_path / "set", dataclasses.replace(TINY, **{field: value}))
    assert not list(tmp_path.iterdir())


def test_the_number_of_photos_asked_for_is_enough(tmp_path):
    with pytest.raises(UserError, match="expected at least 6 so") as caught:
        write_synthetic(tmp_path / "set", dataclasses.replace(TINY, train_images=5))
    assert "each of the 5 identities appears in 5 photos" in str(caught.value)
    write_synthetic(tmp_path / "set", dataclasses.replace(TINY, train_images=6))
    assert min(len(scenes) for scenes in _train_scenes(tmp_path / "set").values()) >= 5


def test_an_interrupt_leaves_nothing(tmp_path):
    spec = dataclasses.replace(SPEC, train_images=5000)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    ctrl_c = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", spec)
    signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_root(tmp_path):
    spec = dataclasses.replace(SPEC, train_images=5000)
    code = (
        "import pathlib, data_pipeline.synthetic.dataset as s;"
        f"s.write_synthetic(pathlib.Path({str(tmp_path / 'set')!r}), s.{spec!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".set-*/set/Image/SSM/s00009.jpg")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "set").exists()
    write_synthetic(tmp_path / "set", TINY)
    assert (tmp_path / "set/synthetic.json").is_file()
