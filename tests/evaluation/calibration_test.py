"""Similarities as probabilities: against scikit-learn, by hand, and in galleries of other sizes."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from alignps_jax.checkpoint.places import CALIBRATION
from alignps_jax.evaluation.calibration import LIMIT, count, fit, load, words
from alignps_jax.types import UserError

CENTERS, BORDERS = (np.arange(200) - 99.5) / 100, np.linspace(-1, 1, 201)[1:-1]


def pairs(rng, searches, others, times=3):
    """Similarities, some beyond 1, of right and wrong results of searches among `others`."""
    return rng.normal(0.6, 0.2, (searches, times)), rng.normal(0.1, 0.18, (searches, others))


def counted(similarity):
    return count(np.sort(np.ravel(similarity))[::-1].astype(np.float32))


def fitted(right, wrong):
    """The calibration of searches, a row of each, with these results."""
    everything = np.concatenate([right, wrong], axis=1)
    first, alone = (np.sort(rows)[:, -1:] for rows in (everything, wrong))
    return fit("some, all", np.stack([*map(counted, (everything, right, first, alone))]))


def regression(rows, right, asked):
    """scikit-learn's, of similarities, whether they are right, and two more that nobody saw."""
    x = CENTERS[np.digitize(np.asarray(rows, np.float32), BORDERS)]
    x, y = np.append(x, [x.min(), x.max()]), np.append(right, [1, 0])
    return IsotonicRegression(out_of_bounds="clip").fit(x, y).predict(asked)


@pytest.mark.parametrize(("searches", "others"), [(40, 57), (7, 5), (1, 1)])
def test_the_curves_are_scikit_learns(searches, others):
    right, wrong = pairs(np.random.default_rng(searches), searches, others)
    curve = fitted(right, wrong)
    assert curve.people == others + 3
    both, asked = np.append(right, wrong), np.random.default_rng(1).uniform(-1.2, 1.2, 120)
    found = curve.of(asked.reshape(30, 4), others + 3)
    expected = regression(both, np.arange(both.size) < right.size, asked)
    np.testing.assert_allclose(found, expected.reshape(30, 4), atol=1e-9)
    assert 0 < found.min() <= found.max() < 1
    best = np.append(np.maximum(right.max(axis=1), wrong.max(axis=1)), wrong.max(axis=1))
    expected = regression(best, np.repeat([1, 0], searches), curve.similarity)
    np.testing.assert_allclose(curve.there, expected, atol=1e-9)


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
    everything = np.concatenate([right, wrong], axis=1)
    order = np.argsort(-everything, axis=1)
    found, is_right = np.take_along_axis(everything, order, axis=1), order < right.shape[1]
    absent = -np.sort(-wrong, axis=1)  # what is found of somebody who is not there
    judged = [curve.results(one, others + 3) for one in (*found, *absent)]
    for likely, true in (
        (curve.of(found, others + 3).ravel(), is_right.ravel()),
        (np.concatenate(judged), np.append(is_right, np.zeros(wrong.shape, bool))),
    ):
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
    assert load(None) is load(tmp_path) is None
    curve = fitted(*pairs(np.random.default_rng(5), 9, 11))
    curve.save(tmp_path)
    assert load(tmp_path) == curve
    content = (tmp_path / CALIBRATION).read_text()
    for damaged in (
        "",
        "{}",
        "[1, 2]",
        content.replace('"people": ', '"people": "many"'),
        content[:99],
    ):
        (tmp_path / CALIBRATION).write_text(damaged)
        with pytest.raises(UserError, match=rf"{CALIBRATION}: "):
            load(tmp_path)
