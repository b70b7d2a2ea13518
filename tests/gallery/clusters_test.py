"""Clusters of people against average linkage, one pair of clusters at a time."""

import itertools

import numpy as np
import pytest

from alignps_jax.gallery.clusters import clusters


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def people(rng, count, persons=4, noise=0.5):
    """Embeddings of some persons, unlike in number, and who each is."""
    who = np.minimum(rng.geometric(0.4, count) - 1, persons - 1)
    centers = rng.normal(size=(persons, 24))
    return unit(centers[who] + noise * rng.normal(size=(count, 24))), who


def average_linkage(embeddings, scene, limit, fixed):
    """All pairs of clusters are compared before the most similar two that may join do."""
    names = {name: [i for i, other in enumerate(fixed) if other == name] for name in set(fixed)}
    found = [[i] for i in names.pop("", [])] + list(names.values())

    def mean(pair):
        one, other = pair
        apart = {scene[i] for i in one}.isdisjoint(scene[i] for i in other)
        free = not any(fixed[i] for i in one) or not any(fixed[i] for i in other)
        similarity = (embeddings[one].astype(float) @ embeddings[other].astype(float).T).mean()
        return similarity if apart and free else -np.inf

    while len(found) > 1:
        one, other = max(itertools.combinations(found, 2), key=mean)
        if mean((one, other)) < limit:
            break
        found = [each for each in found if each not in (one, other)] + [one + other]
    return {frozenset(each) for each in found if len(each) > 1 or fixed[each[0]]}


@pytest.mark.parametrize("seed", range(12))
def test_they_are_those_of_average_linkage(seed):
    rng = np.random.default_rng(seed)
    count = [14, 1, 2, 16][seed % 4]  # all are neighbors
    embeddings, _ = people(rng, count)
    scene = rng.integers(0, 9, count)
    fixed = rng.choice(["", "", "", "a", "b"], count).tolist() if seed > 5 else [""] * count
    limit = float(rng.uniform(0, 0.8))
    found = clusters(embeddings, scene, limit, fixed)
    expected = average_linkage(embeddings, scene.tolist(), limit, fixed)
    assert {frozenset(rows.tolist()) for rows in found} == expected
    assert sum(map(len, found)) == sum(map(len, expected))


def test_many_people_most_typical_first():
    rng = np.random.default_rng(1)
    embeddings, who = people(rng, 1500, persons=6, noise=0.15)
    found = clusters(embeddings, np.arange(1500), 0.5, [""] * 1500)
    assert sorted(map(len, found)) == sorted(np.bincount(who)[np.bincount(who) > 1].tolist())
    for rows in found:
        assert len(set(who[rows])) == 1
        center = embeddings[rows].mean(axis=0)
        assert (np.diff(embeddings[rows] @ center) <= 1e-5).all()


def test_people_of_one_photo_stay_apart():
    same = unit(np.ones((4, 8)))
    found = clusters(same, np.array([1, 1, 2, 2]), 0.9, [""] * 4)
    assert sorted(len(rows) for rows in found) == [2, 2]
    assert clusters(same, np.zeros(4, int), -1.0, [""] * 4) == []
    (alone,) = clusters(same, np.zeros(4, int), 0.5, ["", "mine", "", ""])
    assert alone.tolist() == [1]
