"""Groups: clusters against a loop over all pairs; what users do to them stays."""

import datetime
import itertools

import numpy as np
import pytest

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import Calibration
from alignps_jax.gallery.entries import Filter
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.groups import Groups, clusters, make_groups
from tests.gallery.painted import commit, detections, made_up


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
    scene, who = rng.integers(0, 9, count), rng.integers(0, 4, count)
    rows = rng.normal(size=(4, 24))[who] + 0.5 * rng.normal(size=(count, 24))
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    number = rng.choice([0, 0, 0, 1, 2], count) * (seed > 5)
    found = clusters(embeddings, scene, limit, number)
    expected = joined(embeddings, scene.tolist(), limit, number)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    for rows in found:  # the most typical first
        assert (np.diff(embeddings[rows] @ embeddings[rows].mean(axis=0)) <= 1e-5).all()


def add(gallery, number, persons):
    """Stores a photo: 0 to 3 are of one day, 4 and 5 of the next, later ones of no known day."""
    day = datetime.datetime(2024, 5, 1 + (number > 3), 9, number) if number < 6 else None
    embeddings = np.eye(16)[["ABC".index(who) for who in persons]] + 0.01 * np.eye(16)[number]
    boxes = [[0, 10, 30, 90], [50, 10, 80, 80]][: len(persons)]
    found = detections(boxes, [0.9, 0.8][: len(persons)], embeddings)
    commit(gallery, [made_up(f"/{('even', 'odd')[number % 2]}/{number}.jpg", found, day)])


@pytest.fixture
def gallery(gallery):
    gallery.calibration = Calibration("", 99.0, [0.4, 0.6], *[[0.1, 0.9]] * 2, *[[1, 9]] * 2)
    for number, persons in enumerate(["AB", "AB", "AC", "A", "A", "B", "A", "A"], 1):
        add(gallery, number, persons)
    return gallery


def shown(gallery, groups):
    """Photos, day, name of each group."""
    found = []
    for group in groups:
        people = gallery.memory().named(group.people).values()
        photos = sorted(person.scene.path[-5] for person in people)
        found.append(("".join(photos), group.day, group.name))
    return sorted(found)


def test_groups_hold_for_a_day_or_across_days(gallery):
    by_day = [(photos, day) for photos, day, _ in shown(gallery, make_groups(gallery, Filter()))]
    days = ["2024-05-01", "2024-05-01", "2024-05-02", ""]
    assert by_day == [*zip(("12", "123", "45", "78"), days, strict=True)]
    everybody = make_groups(gallery, Filter(), across_days=True)
    assert [len(group.people) for group in everybody] == [7, 3]
    assert shown(gallery, everybody) == [("1234578", "", ""), ("126", "", "")]
    even = make_groups(gallery, Filter(folder="/even"), across_days=True)
    assert [photos for photos, *_ in shown(gallery, even)] == ["1", "1357", "248", "26"]
    gallery.calibration = None
    with pytest.raises(UserError, match="not calibrated"):
        make_groups(gallery, Filter())


def test_what_users_do_stays_even_while_groups_are_made(gallery, monkeypatch):
    make_groups(gallery, Filter())
    groups, elsewhere = Groups(gallery.people), Groups(gallery.people)
    people = gallery.memory().named(groups.by_person()).values()
    ids = {one.scene.path[-5]: one.id for one in people if one.box[0] == 0}
    first, other = (groups.by_person()[ids[photo]] for photo in "14")

    def meanwhile(*given):
        groups.put(first.people, "Anna")
        return clusters(*given)

    with monkeypatch.context() as patched:
        patched.setattr("alignps_jax.gallery.groups.clusters", meanwhile)
        make_groups(gallery, Filter())
    anna = groups.by_person()[ids["1"]]
    assert (anna.name, anna.day, {*anna.people}) == ("Anna", "2024-05-01", {*first.people})
    merged = elsewhere.put([*other.people, *anna.people, "nobody"])
    assert (merged.name, merged.day) == ("Anna", "")
    assert {*merged.people} == {*other.people, *anna.people}
    alone = groups.put([ids["2"]], "")
    assert (alone.people, alone.name) == ([ids["2"]], "")
    add(gallery, 9, "AB")
    add(gallery, 0, "A")
    found = [(photos, name) for photos, _, name in shown(gallery, make_groups(gallery, Filter()))]
    assert found == [("01345", "Anna"), ("12", ""), ("2", ""), ("69", ""), ("789", "")]
    assert elsewhere.all()[0].name == "Anna"
    gallery.people.remove(["/odd/7.jpg"])
    assert ("89", "", "") in shown(gallery, make_groups(gallery, Filter()))
    forget(gallery.people, photos=["/odd/1.jpg"])
    assert ("0345", "", "Anna") in shown(gallery, groups.all())
    assert ids["1"] not in groups.by_person()
    with pytest.raises(UserError, match="nobody of a group"):
        groups.put([ids["1"]], "x")
