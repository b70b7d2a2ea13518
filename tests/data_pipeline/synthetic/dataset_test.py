"""The synthetic data set as the reader of CUHK-SYSU sees it, its drawing, and what is refused."""

import dataclasses

import cv2
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from alignps_jax.errors import UserError
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.synthetic.dataset import SyntheticSpec, write_synthetic
from data_pipeline.synthetic.figures import draw_person, sample_person
from data_pipeline.synthetic.scenes import draw_scene

# Photos for training, for tests, identities for training, for tests.
SPEC = SyntheticSpec(3, 24, 102, 13, 11, height=120, width=168)
TINY = SyntheticSpec(3, 9, 7, 5, 4, height=120, width=168)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(folder, SPEC)
    return CuhkSysuSource(folder)


def _places(people):
    """Identity -> image -> box; every identity is once in an image."""
    places = {}
    for image, (boxes, ids) in enumerate(zip(people.boxes, people.identity, strict=True)):
        for box, identity in zip(boxes, ids, strict=True):
            if identity >= 0:
                assert image not in places.setdefault(identity, {})
                places[identity][image] = tuple(box)
    return places


@pytest.mark.parametrize("size", [50, 100])
def test_galleries_start_with_every_photo_of_the_person(source, size):
    protocol, places = source.protocol(f"TestG{size}"), _places(source.test)
    asked = set()
    for query, image in enumerate(protocol.query_image):
        held = places[query // 2]
        assert held[image] == tuple(protocol.query_box[query])
        found = dict(zip(protocol.target_images[query], protocol.target_boxes[query], strict=True))
        assert {one: tuple(box) for one, box in found.items()} | {image: held[image]} == held
        assert image not in found
        gallery = protocol.gallery[query].tolist()
        assert len({*gallery, image}) == size + 1
        assert gallery[: len(found)] == [*found]
        smaller = source.protocol("TestG50")
        assert {*smaller.gallery[query]} <= {*gallery}
        assert smaller.query_image[query] == image
        asked.add((query // 2, image))
    assert len(asked) == 2 * SPEC.test_identities == len(protocol.query_image)


def test_everybody_is_in_enough_photos(source):
    for people, identities in ((source.train, 13), (source.test, 11)):
        places = _places(people)
        assert sorted(places) == [*range(identities)]
        counts = [len(images) for images in places.values()]
        assert max(counts) - 1 <= min(counts) >= 4
        labeled, everybody = map(sum, people.labeled), map(len, people.boxes)
        assert {4, 5, 6} == {*map(int, labeled)}
        assert max(everybody) == 7
    assert not source.notes
    assert not set(source.train.names) & set(source.test.names)


def test_boxes_lie_in_the_photo_and_sizes_vary(source):
    for path in (source.root / "Image/SSM").iterdir():
        assert cv2.imread(str(path)).shape == (SPEC.height, SPEC.width, 3)
    boxes = np.concatenate([*source.train.boxes, *source.test.boxes])
    assert (boxes >= 0).all()
    assert (boxes <= (SPEC.width, SPEC.height) * 2).all()
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert sizes.min() > 0
    assert sizes[:, 1].max() >= 4 * sizes[:, 1].min()


def test_torso_color_belongs_to_the_identity(source):
    colors, identities = [], []
    for identity, images in _places(source.train).items():
        for image, box in images.items():
            left, top, right, bottom = map(int, box)
            photo = cv2.imread(str(source.root / "Image/SSM" / source.train.names[image]))
            torso = photo[top + (bottom - top) // 4 : (top + bottom) // 2, left + 2 : right - 2]
            colors.append(torso.reshape(-1, 3).mean(axis=0))
            identities.append(identity)
    distance, same = pdist(colors), pdist(np.array(identities)[:, None]) == 0
    # The light and the pose change it all the same.
    assert 5 < distance[same].mean() < 0.75 * distance[~same].mean()


def _people(rng, count, candidates=1):
    people, looks = [], np.empty((0, 0))
    for _ in range(count):
        people.append(sample_person(rng, looks, candidates))
        looks = np.array([person.describe() for person in people])
    return people


def test_chosen_people_look_unlike_each_other():
    nearest = []
    for candidates in (1, 20):
        people = _people(np.random.default_rng(0), 30, candidates)
        nearest.append(pdist([person.describe() for person in people]).min())
    assert nearest[1] > 1.3 * nearest[0]


def test_figures_stay_inside_their_canvas():
    rng = np.random.default_rng(1)
    for person in _people(rng, 40):
        sprite = draw_person(person, rng)
        assert 215 < sprite.shape[0] < 260
        assert sprite.shape[1] < 225
        assert not sprite[sprite[..., 3] == 0].any()


@pytest.mark.parametrize("seed", range(8))
def test_boxes_hold_what_is_seen_of_a_person(seed):
    """Other colors change exactly the pixels of the box that show the person."""
    people, index = _people(np.random.default_rng(2), 6), seed % 6
    image, boxes = draw_scene(people, 160, 208, np.random.default_rng(seed))
    inverted = {part: tuple(255 - c for c in color) for part, color in people[index].colors.items()}
    people[index] = dataclasses.replace(people[index], colors=inverted)
    other, same = draw_scene(people, 160, 208, np.random.default_rng(seed))
    np.testing.assert_array_equal(boxes, same)
    changed = (np.abs(image.astype(int) - other) > 15).any(axis=2).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(changed)
    left, top, wide, tall = boxes[index]
    corners = left, top, left + wide, top + tall
    np.testing.assert_allclose((x, y, x + width, y + height), corners, atol=2)
    assert changed.sum() > 0.25 * wide * tall


def test_the_seed_decides_on_everything(tmp_path):
    drawn = []
    for name, seed in (("ours", 3), ("again", 3), ("other", 4)):
        write_synthetic(tmp_path / name, dataclasses.replace(TINY, seed=seed))
        source = CuhkSysuSource(tmp_path / name)
        photos = [path.read_bytes() for path in sorted((source.root / "Image/SSM").iterdir())]
        drawn.append((photos, _places(source.train), _places(source.test)))
    ours, again, other = drawn
    assert ours == again
    assert all(one != two for one, two in zip(ours, other, strict=True))
    assert len(set(ours[0]) | set(other[0])) == 2 * 16
    # Few test photos give one protocol, in which all others are the gallery.
    assert source.protocols == ("TestG50", "all")
    assert {len(gallery) for gallery in source.protocol("TestG50").gallery} == {6}


def test_an_existing_set_is_kept_and_anything_else_is_refused(tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    write_synthetic(tmp_path / "tiny", TINY)
    assert "found no scenes in" in capsys.readouterr().out
    write_synthetic(tmp_path / "tiny", TINY)
    assert not capsys.readouterr().out
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "file").write_text("")
    few, other = dataclasses.replace(TINY, train_images=3), dataclasses.replace(TINY, seed=8)
    for place, spec in (("tiny", other), ("photos", TINY), ("file", TINY), ("few", few)):
        with pytest.raises(UserError, match=r"found .*, expected "):
            write_synthetic(tmp_path / place, spec)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "photos", "file"}
