"""Groups: clusters against a loop over all pairs; what users do to them stays."""

import datetime
import itertools

import numpy as np
import pytest

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import Calibration
from alignps_jax.gallery.entries import Filter, Scene, scene_id
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.groups import Groups, clusters, make_groups
from alignps_jax.gallery.people import FileState, FoundScene
from alignps_jax.types import Detections
from tests.gallery.finder import Finder


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def people(rng, count):
    """Embeddings of four persons, unlike in number, and who each is."""
    who = np.minimum(rng.geometric(0.4, count) - 1, 3)
    return unit(rng.normal(size=(4, 24))[who] + 0.5 * rng.normal(size=(count, 24))), who


def joined(embeddings, scene, limit, number):
    """Clusters as sets: all pairs, the most similar first, join those whose mean is high enough."""
    names = {name: frozenset(np.flatnonzero(number == name).tolist()) for name in set(number)}
    found = {frozenset([row]) for row in names.pop(0, [])} | set(names.values())
    similarity = embeddings.astype(float) @ embeddings.astype(float).T
    pairs = itertools.combinations(range(len(scene)), 2)
    for pair in sorted(pairs, key=lambda pair: -similarity[pair]):
        if similarity[pair] < limit:
            break
        one, other = (next(each for each in found if row in each) for row in pair)
        free = not any(number[list(one)]) or not any(number[list(other)])
        apart = {scene[row] for row in one}.isdisjoint(scene[row] for row in other)
        mean = np.mean([similarity[pair] for pair in itertools.product(one, other)])
        if one != other and free and apart and mean >= limit:
            found = found - {one, other} | {one | other}
    return {each for each in found if len(each) > 1}


@pytest.mark.parametrize("seed", range(12))
def test_they_are_those_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    count, limit = [14, 1, 2, 16][seed % 4], float(rng.uniform(0, 0.8))  # all are neighbors
    embeddings, scene = people(rng, count)[0], rng.integers(0, 9, count)
    number = rng.choice([0, 0, 0, 1, 2], count) * (seed > 5)
    found = clusters(embeddings, scene, limit, number)
    expected = joined(embeddings, scene.tolist(), limit, number)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_many_people_the_most_typical_first():
    embeddings, who = people(np.random.default_rng(1), 1500)
    found = clusters(embeddings, np.arange(1500), 0.5, np.zeros(1500, int))
    assert sorted(map(len, found)) == sorted(np.bincount(who).tolist())
    for rows in found:
        assert len(set(who[rows])) == 1
        assert (np.diff(embeddings[rows] @ embeddings[rows].mean(axis=0)) <= 1e-5).all()


# Who is in which photo.
PHOTOS = ("AB", "AB", "AC", "A", "A", "B", "A", "A")


def add(gallery, number, persons):
    """Stores a photo: 1 to 3 are of one day, 4 and 5 of the next, later ones of no known day."""
    path = f"/{'odd' if number % 2 else 'even'}/{number}.jpg"
    day = datetime.datetime(2024, 5, 1 + (number > 3), 9, number) if number < 6 else None
    embeddings = np.eye(16)[[ord(who) - ord("A") for who in persons]] + 0.01 * np.eye(16)[number]
    boxes = np.array([[0, 10, 30, 90], [50, 10, 80, 90]], np.float32)[: len(persons)]
    found = Detections(boxes, boxes[:, 3] / 99, unit(embeddings), boxes[:, 3] > 0)
    scene = Scene(scene_id(path, None), path, 120, 160, day, "", None, path)
    gallery.people.commit([FoundScene(scene, found)], [FileState(path, 1, 1, path)])


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.open(tmp_path / "people.lance", Finder(), create=True)
    made.calibration = Calibration("", 99.0, [0.4, 0.6], *[[0.1, 0.9]] * 2, *[[1, 9]] * 2)
    for number, persons in enumerate(PHOTOS, 1):
        add(made, number, persons)
    return made


def shown(gallery, groups):
    """Photos, day, name of each group."""
    photos = [
        [gallery.memory().person(one).scene.path[-5] for one in group.people] for group in groups
    ]
    found = zip(photos, groups, strict=True)
    return sorted(("".join(sorted(each)), group.day, group.name) for each, group in found)


def test_groups_hold_for_a_day_or_across_days(gallery):
    by_day = shown(gallery, make_groups(gallery, Filter()))
    assert [photos for photos, *_ in by_day] == ["12", "123", "45", "78"]
    assert [day for _, day, _ in by_day] == [*["2024-05-01"] * 2, "2024-05-02", ""]
    everybody = make_groups(gallery, Filter(), across_days=True)
    assert shown(gallery, everybody[:1]) == [("1234578", "", "")]
    assert shown(gallery, everybody[1:]) == [("126", "", "")]
    even = make_groups(gallery, Filter(folder="/even"), across_days=True)
    assert [photos for photos, *_ in shown(gallery, even)] == ["1", "1357", "248", "26"]
    gallery.calibration = None
    with pytest.raises(UserError, match="not calibrated"):
        make_groups(gallery, Filter())


def test_what_users_do_while_groups_are_made_stays(gallery, monkeypatch):
    groups = Groups(gallery.people)
    for one in make_groups(gallery, Filter()):
        monkeypatch.setattr(
            "alignps_jax.gallery.groups.clusters",
            lambda *given, one=one: (groups.put(one.people, one.people[0]), clusters(*given))[1],
        )
        make_groups(gallery, Filter())
        assert groups.by_person()[one.people[0]].name == one.people[0]


def test_what_users_do_stays(gallery):
    memory = gallery.memory()
    everybody = memory.people(np.arange(len(memory)))
    ids = {one.scene.path[-5]: one.id for one in everybody if one.box[0] == 0}
    make_groups(gallery, Filter())
    groups, elsewhere = Groups(gallery.people), Groups(gallery.people)
    first, other = (groups.by_person()[ids[photo]] for photo in "14")
    anna = groups.put(first.people, "Anna")
    assert (anna.name, anna.day) == ("Anna", "2024-05-01")
    merged = elsewhere.put([*other.people, *anna.people, "nobody"])
    assert (merged.name, merged.day) == ("Anna", "")
    assert sorted(merged.people) == sorted(other.people + anna.people)
    alone = groups.put([ids["2"]], "")
    assert (alone.people, alone.name) == ([ids["2"]], "")
    add(gallery, 9, "AB")
    add(gallery, 3, "A")  # nothing new
    found = [(photos, name) for photos, _, name in shown(gallery, make_groups(gallery, Filter()))]
    assert found == [("12", ""), ("1345", "Anna"), ("2", ""), ("69", ""), ("789", "")]
    assert elsewhere.all()[0].name == "Anna"
    gallery.people.remove(["/odd/7.jpg"])
    assert ("89", "", "") in shown(gallery, make_groups(gallery, Filter()))
    forget(gallery.people, photos=["/odd/1.jpg"])
    assert ("345", "", "Anna") in shown(gallery, groups.all())
    assert ids["1"] not in groups.by_person()
    with pytest.raises(UserError, match="nobody of a group"):
        groups.put([ids["1"]], "x")
