"""Precision against recall: the curves whose areas are the published metrics.

Average precision is an area, so a metric and its curve are computed from the same numbers: the
precisions at the hits, which are the results that find somebody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """A curve of E steps: `precision[e]` holds for recalls from `edges[e]` to `edges[e + 1]`."""

    edges: Float[np.ndarray, "E_plus_1"]
    precision: Float[np.ndarray, "E"]

    @property
    def area(self) -> float:
        """Average precision (times recall): the mean of the precision over recalls 0 to 1."""
        return float(np.sum(np.diff(self.edges) * self.precision))


def precision_at_hits(
    hit_scores: Float[np.ndarray, "P"], scores: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "P"]:
    """Precision among everything that scores at least as much as each hit, worst hit first.

    Equal scores count together. The mean over the hits is scikit-learn's average precision, hence
    the sum over the number of things to be found is average precision times recall.

    Args:
      hit_scores: the scores of the hits, in any order.
      scores: those of all results, the hits among them.
    """
    if hit_scores.size == 0:
        return np.zeros(0)
    hits = np.sort(hit_scores)
    # Nothing below the worst hit has a say, and that is most of a gallery: it is not sorted.
    above = np.sort(scores[scores >= hits[0]])
    true = hits.size - np.searchsorted(hits, hits)
    return true / (above.size - np.searchsorted(above, hits))


def mean_curve(hits: Iterable[tuple[Float[np.ndarray, "_P"], int]]) -> PrecisionRecall:
    """The mean of the curves of several queries.

    Args:
      hits: per query `precision_at_hits`, and the number n of what could have been found. The k-th
        best hit stands for the recalls from (k - 1) / n to k / n; beyond the last hit precision is
        zero.
    """
    steps = [
        (np.arange(len(precision) + 1) / max(total, 1), precision[::-1])
        for precision, total in hits
    ]
    edges = np.unique(np.concatenate([[0.0, 1.0], *(edges for edges, _ in steps)]))
    # What every query adds to the sum where one of its steps begins, and takes off where it ends.
    change = np.zeros(len(edges))
    for own, precision in steps:
        places = np.searchsorted(edges, own)
        np.add.at(change, places[:-1], precision)
        np.add.at(change, places[1:], -precision)
    return PrecisionRecall(edges, np.cumsum(change)[:-1] / max(len(steps), 1))
