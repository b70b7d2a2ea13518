"""How likely a result of a search shows the same person: similarities as probabilities.

The estimate answers: of all results of this similarity, over searches of people who are in the
gallery as often as the queries of the evaluation, which share shows the person? It is the isotonic
regression of "right" on the similarity, over all pairs of a query and a detection of its gallery,
as the evaluation judges them. A gallery of more people has more that look alike by chance and not
more that are right: the odds fall with the number of people. In one of fewer people they stay: it
holds a person less often, too.
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
# Similarities are counted in bins of 0.01; the outer two have no end.
BINS = 200
_BORDERS = np.linspace(-1, 1, BINS + 1)[1:-1]
_CENTERS = np.linspace(-1, 1, 2 * BINS + 1)[1::2]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A curve from similarity to probability, over C bins with pairs, and what it comes from.

    Attributes:
      dataset: that it was measured on, and the protocol.
      people: mean number of detections among which a query was searched.
      similarity: centers of the bins, ascending.
      probability: of the same person; it never falls.
      right, wrong: number of pairs.
    """

    dataset: str
    people: float
    similarity: list[float]
    probability: list[float]
    right: list[int]
    wrong: list[int]

    def of(self, similarity: Float[AnyArray, "*S"], people: int) -> Float[np.ndarray, "*S"]:
        """The probability that results show the person who is searched among so many `people`."""
        measured = np.interp(similarity, self.similarity, self.probability)
        right, wrong = measured * self.people, (1 - measured) * max(people, self.people)
        return np.asarray(right / (right + wrong))

    def least(self, probability: float, people: int) -> float:
        """The similarity from which results are at least so likely; infinite where none is."""
        reached = self.of(np.array(self.similarity), people) >= probability
        return min(np.array(self.similarity)[reached].tolist(), default=math.inf)

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""
        write_json(folder / CALIBRATION, dataclasses.asdict(self))


def load(folder: Path | None) -> Calibration | None:
    """The calibration in a step's folder, if there is one; UserError if it is damaged."""
    path = folder and folder / CALIBRATION
    if not path or not path.is_file():
        return None
    with blame(path):
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
        if len(found.similarity) != len(found.probability) or not found.similarity:
            raise ValueError(f"found {len(found.probability)} probabilities, expected one per bin")
        return found


def words(probability: float) -> str:
    """A probability as people read it: "likely the same person (71%)", never 0% or 100%."""
    word = next(word for least, word in _WORDS.items() if probability >= least)
    return f"{word} the same person ({min(max(probability, 0.01), 0.99):.0%})"


def count(similarity: Float[np.ndarray, "R"]) -> Int[np.ndarray, "bins"]:
    """Number of similarities in each bin; they are sorted, the highest first."""
    first = np.searchsorted(similarity[::-1], _BORDERS)
    return np.diff(first, prepend=0, append=len(similarity))


def fit(
    dataset: str, right: Int[np.ndarray, "bins"], wrong: Int[np.ndarray, "bins"], searches: int
) -> Calibration | None:
    """The curve of some searches with these numbers of results; None where they had none."""
    used = np.flatnonzero(right + wrong)
    if not used.size:
        return None
    right, wrong = right[used], wrong[used]
    # A wrong result more in the best bin and a right one in the worst: nothing is ever certain.
    more = np.eye(1, used.size, dtype=int)[0]
    total = right + more + wrong + more[::-1]
    fitted = isotonic_regression((right + more) / total, weights=total).x
    people = float(right.sum() + wrong.sum()) / searches
    curve = _CENTERS[used].round(3).tolist(), fitted.tolist()
    return Calibration(dataset, people, *curve, right.tolist(), wrong.tolist())
