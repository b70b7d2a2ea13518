"""How likely a result of a search shows the same person: similarities as probabilities.

Two isotonic regressions on what the evaluation's searches found: which share of all results of a
similarity is right, and how often the person is there at all, by the similarity of the best result.
For that each search counts as it is, and again without the person: half of them are there.

A gallery of more people has more that look alike by chance and not more that are right: the odds
fall with the number of people. In one of fewer people they stay: it holds a person less often, too.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression

from alignps_jax.checkpoint.places import CALIBRATION
from alignps_jax.errors import blame
from alignps_jax.files import write_json
from alignps_jax.types import AnyArray

# Results of a search end below this probability.
LIMIT = 0.25
NOBODY = "nobody in this gallery is likely to be this person"
NOT_CALIBRATED = "not calibrated: --mode=evaluate measures how likely a similarity is right"
_WORDS = {0.9: "very likely", 0.6: "likely", LIMIT: "possibly", 0.0: "unlikely"}
# Centers of the bins of 0.01 in which similarities are counted; the outer two have no end.
CENTERS = np.linspace(-0.995, 0.995, 200)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Curves over the bins with results (`similarity` are their centers, ascending).

    `probability` is that a result of a person who is there is right, `there` that the person is, by
    the best result; both never fall. They were measured on `dataset` and a protocol, each query
    among `people` detections (mean). `right` and `wrong` are numbers of results.
    """

    dataset: str
    people: float
    similarity: list[float]
    probability: list[float]
    there: list[float]
    right: list[int]
    wrong: list[int]

    def of(self, similarity: Float[AnyArray, "*S"], people: int = 0) -> Float[np.ndarray, "*S"]:
        """The probability that two are the same person, one of them searched among `people`."""
        measured = np.interp(similarity, self.similarity, self.probability)
        right, wrong = measured * self.people, (1 - measured) * max(people, self.people)
        return np.asarray(right / (right + wrong))

    def results(self, similarity: Float[np.ndarray, "K"], people: int) -> Float[np.ndarray, "K"]:
        """The probabilities that the results of a search among `people` are right, best first."""
        there = np.interp(similarity[:1], self.similarity, self.there)
        # Beyond even odds, they come from right results: chance alone makes odds of one or less.
        more = np.maximum(0, there / (1 - there) - 1) * self.people / max(people, self.people)
        return self.of(similarity, people) * np.where(more > 0, 1 - 1 / (2 + more), there)

    def least(self, probability: float, people: int = 0) -> float:
        """The similarity from which `of` is at least so high; infinite where it never is."""
        likely = self.of(np.array(self.similarity), people) >= probability
        return self.similarity[int(likely.argmax())] if likely.any() else math.inf

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""
        write_json(folder / CALIBRATION, vars(self))


def load(folder: Path | None) -> Calibration | None:
    """The calibration in a step's folder, if there is one; UserError if it is damaged."""
    path = folder and folder / CALIBRATION
    if not path or not path.is_file():
        return None
    with blame(path):
        return msgspec.json.decode(path.read_bytes(), type=Calibration)


def words(probability: float) -> str:
    """A probability as people read it: "likely the same person (71%)", never 0% or 100%."""
    word = next(word for least, word in _WORDS.items() if probability >= least)
    return f"{word} the same person ({min(max(probability, 0.01), 0.99):.0%})"


def count(similarity: Float[np.ndarray, "R"]) -> Int[np.ndarray, "bins"]:
    """Number of similarities in each bin; they are sorted, the highest first."""
    first = np.searchsorted(similarity[::-1], np.linspace(-1, 1, CENTERS.size + 1)[1:-1])
    return np.diff(first, prepend=0, append=len(similarity))


def fit(dataset: str, counts: Int[np.ndarray, "4 bins"]) -> Calibration | None:
    """The curves of some searches with these numbers of results; None where they had none.

    `counts` are those of all results, the right ones, and the first and first wrong of each search.
    """
    results, right, first, alone = counts
    used, wrong = np.flatnonzero(results), results - right
    if not used.size:
        return None
    likely, there = (_rising(*both)[used].tolist() for both in ((right, wrong), (first, alone)))
    people, found = float(results.sum() / first.sum()), (right[used].tolist(), wrong[used].tolist())
    return Calibration(dataset, people, CENTERS[used].round(3).tolist(), likely, there, *found)


def _rising(
    right: Int[np.ndarray, "bins"], wrong: Int[np.ndarray, "bins"]
) -> Float[np.ndarray, "bins"]:
    """The share that is right, as a curve that never falls."""
    used = np.flatnonzero(right + wrong)
    # A wrong one more in the best bin and a right one in the worst: nothing is ever certain.
    more = np.eye(1, used.size, dtype=int)[0]
    total = right[used] + more + wrong[used] + more[::-1]
    share = isotonic_regression((right[used] + more) / total, weights=total).x
    return np.interp(CENTERS, CENTERS[used], share)
