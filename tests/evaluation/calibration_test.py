"""Similarities as probabilities: against scikit-learn, by hand, and in galleries of other sizes."""

import dataclasses

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from alignps_jax.checkpoint.places import CALIBRATION
from alignps_jax.evaluation.calibration import LIMIT, count, fit, load, words
from alignps_jax.types import UserError

CENTERS, BORDERS = (np.arange(200) - 99.5) / 100, np.linspace(-1, 1, 201)[1:-1]


def pairs(rng, searches, others, times=3):
    """Similarities of right and of wrong results of searches among `others` strangers."""
    right = np.clip(rng.normal(0.6, 0.2, (searches, times)), -1, 1)
    wrong = np.clip(rng.normal(0.1, 0.18, (searches, others)), -1, 1)
    return right, wrong


def counted(similarity):
    return count(np.sort(np.ravel(similarity))[::-1].astype(np.float32))


def fitted(right, wrong):
    """The calibration of searches, a row of each, with these results."""
    everything = np.concatenate([right, wrong], axis=1)
    first, alone = (
        counted([max(each) for each in rows if len(each)]) for rows in (everything, wrong)
    )
    counts = np.stack([counted(everything), counted(right), first, alone])
    return fit("some, all", counts)


def test_counts_against_a_loop():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1.1, 1.1, 500), [-1, 1, 0.999, 0.0051, -0.0051]])
    expected = np.zeros(200, int)
    for value in values:
        expected[min(max(int(np.floor((value + 1) * 100)), 0), 199)] += 1
    np.testing.assert_array_equal(counted(values), expected)
    assert counted(np.zeros(0)).sum() == 0


@pytest.mark.parametrize(("searches", "others"), [(40, 57), (7, 5), (1, 1)])
def test_the_curve_is_scikit_learns_of_all_pairs_and_of_two_that_nobody_saw(searches, others):
    right, wrong = pairs(np.random.default_rng(searches), searches, others)
    curve = fitted(right, wrong)
    assert curve.people == others + 3
    both = np.concatenate([right.ravel(), wrong.ravel()]).astype(np.float32)
    place = np.digitize(both, BORDERS)
    x = np.concatenate([CENTERS[place], [CENTERS[place.min()], CENTERS[place.max()]]])
    y = np.concatenate([np.ones(right.size), np.zeros(wrong.size), [1, 0]])
    expected = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    asked = np.random.default_rng(1).uniform(-1.2, 1.2, (30, 4))
    found = curve.of(asked, others + 3)
    np.testing.assert_allclose(found, expected.predict(asked.ravel()).reshape(30, 4), atol=1e-9)
    assert 0 < found.min() <= found.max() < 1
    best = [np.concatenate([right, wrong], axis=1).max(axis=1), wrong.max(axis=1)]
    x = CENTERS[np.digitize(np.concatenate(best).astype(np.float32), BORDERS)]
    x, y = np.append(x, [x.min(), x.max()]), np.append(np.repeat([1, 0], searches), [1, 0])
    expected = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    np.testing.assert_allclose(curve.there, expected.predict(curve.similarity), atol=1e-9)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ([[]], [[0.5] * 8], 1 / 10),  # nobody was found
        ([[0.5] * 8], [[]], 9 / 10),
        ([[0.5] * 2], [[0.5] * 6], 3 / 10),  # a network that sees no difference
        ([[0.2] * 2], [[0.9] * 6], 3 / 10),  # one that is worse than that
        ([[0.5]], [[]], 2 / 3),
    ],
)
def test_degenerate_results(right, wrong, expected):
    curve = fitted(np.array(right), np.array(wrong))
    asked = np.array([-1, 0, 0.5, 1.0])
    np.testing.assert_allclose(curve.of(asked, round(curve.people)), expected)
    for people in (0, 1, 10**9):
        for found in (curve.of(asked, people), curve.results(asked[::-1], people)):
            assert ((found > 0) & (found < 1)).all()
    assert curve.results(asked[:0], 5).size == 0
    assert fit("some, all", np.zeros((4, 200), int)) is None


@pytest.mark.parametrize("others", [200, 900, 4000])
def test_it_holds_in_galleries_of_other_sizes(others):
    """Of all results that are called so likely, that share is right; half of the people are there.

    If all of them are, `of` says it.
    """
    curve = fitted(*pairs(np.random.default_rng(3), 1500, 200))
    right, wrong = pairs(np.random.default_rng(4), 600, others)
    found = {"of": ([], []), "results": ([], [])}
    for yes, no in zip(right, wrong, strict=True):
        everything = np.concatenate([yes, no])
        order = np.argsort(-everything)
        is_right = order < len(yes)
        for name, similarity, truth in (
            ("of", everything[order], is_right),
            ("results", everything[order], is_right),
            ("results", np.sort(no)[::-1], np.zeros(others, bool)),  # of somebody who is not there
        ):
            found[name][0].append(getattr(curve, name)(similarity, others + 3))
            found[name][1].append(truth)
    for likely, true in (map(np.concatenate, both) for both in found.values()):
        for low, high in ((0.05, LIMIT), (LIMIT, 0.6), (0.6, 0.9), (0.9, 1)):
            part = (likely >= low) & (likely < high)
            error = 4 * np.sqrt((likely * (1 - likely))[part].sum())
            assert abs(true[part].sum() - likely[part].sum()) <= 0.05 * part.sum() + error
    limit = curve.least(LIMIT, others + 3)
    assert curve.of(np.array(limit), others + 3) >= LIMIT > curve.of(np.array(limit - 0.02), others)
    assert curve.least(0.5, 10**9) == np.inf
    np.testing.assert_array_equal(curve.of(right, 5), curve.of(right, 203))


def test_words():
    texts = {0.0: "unlikely the same person (1%)", LIMIT - 0.01: "unlikely", LIMIT: "possibly"}
    texts |= {0.59: "possibly", 0.714: "likely the same person (71%)", 0.899: "likely"}
    texts |= {0.94: "very likely the same person (94%)", 1.0: "very likely the same person (99%)"}
    for probability, text in texts.items():
        assert words(probability).startswith(text)


def test_it_lies_in_the_folder_of_its_step(tmp_path):
    assert load(None) is None
    assert load(tmp_path) is None
    curve = fitted(*pairs(np.random.default_rng(5), 9, 11))
    curve.save(tmp_path)
    tmp_path = tmp_path.rename(tmp_path.with_name("copied"))
    assert load(tmp_path) == curve


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1, 2]", {"people": "many"}],
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    curve = fitted(*pairs(np.random.default_rng(6), 3, 4))
    if isinstance(content, dict):
        fields = dataclasses.asdict(curve) | content
        content = str(fields).replace("'", '"')
    (tmp_path / CALIBRATION).write_text(content)
    with pytest.raises(UserError, match=rf"{CALIBRATION}: "):
        load(tmp_path)
