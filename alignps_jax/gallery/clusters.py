"""Clusters of people who are likely the same person, by mean similarity (average linkage).

Two clusters join while the mean similarity of their members is at least a limit: chains of similar
people, as single linkage follows, would soon join everybody. People of one photo never join.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from alignps_jax.gallery.nearest import Neighbors, power_of_two_from, top_k

# Neighbors of each person, itself one of them, and people in one search for them.
_NEIGHBORS, _ROWS = 16, 1024


@dataclasses.dataclass
class _Cluster:
    members: list[int]
    scenes: set[int]
    total: Float[np.ndarray, "D"]
    fixed: str


def clusters(
    embeddings: Float[np.ndarray, "N D"],
    scene: Int[np.ndarray, "N"],
    limit: float,
    fixed: Sequence[str],
) -> list[Int[np.ndarray, "_"]]:
    """Rows of people of one person each, the most typical first; single people are left out.

    Those with the same name in `fixed` belong together, those with different ones never do.
    """
    columns = embeddings.astype(float), scene.tolist(), fixed
    of = [_Cluster([i], {s}, e, f) for i, (e, s, f) in enumerate(zip(*columns, strict=True))]

    def join(one: _Cluster, other: _Cluster) -> None:
        if len(one.members) < len(other.members):
            one, other = other, one
        one.members += other.members
        one.scenes |= other.scenes
        one.total = one.total + other.total
        one.fixed = one.fixed or other.fixed
        for member in other.members:
            of[member] = one

    first: dict[str, int] = {}
    for row, name in enumerate(fixed):
        if name and first.setdefault(name, row) != row:
            join(of[first[name]], of[row])
    near = neighbors(embeddings)
    rows, places = np.nonzero(near.similarity >= limit)
    pairs = -near.similarity[rows, places], rows, np.asarray(near.index)[rows, places]
    heap = list(zip(*(column.tolist() for column in pairs), strict=True))
    heapq.heapify(heap)
    while heap:
        distance, i, j = heapq.heappop(heap)
        one, other = of[i], of[j]
        if one is other or one.scenes & other.scenes or (one.fixed and other.fixed):
            continue
        mean = one.total @ other.total / (len(one.members) * len(other.members))
        if mean >= -distance - 1e-6:
            join(one, other)
        elif mean >= limit:  # of larger groups than when it was put there
            heapq.heappush(heap, (-mean, i, j))
    several = {id(one): one for one in of if len(one.members) > 1 or one.fixed}
    members = [(np.array(one.members), one.total) for one in several.values()]
    return [each[np.argsort(-(embeddings[each] @ total))] for each, total in members]


def neighbors(embeddings: Float[np.ndarray, "N D"]) -> Neighbors:
    """The most similar of each of N people, itself first; similarity -inf where there are less."""
    count = len(embeddings)
    size = max(_ROWS, power_of_two_from(count))
    padded = np.zeros((size, embeddings.shape[1]), np.float32)
    padded[:count] = embeddings
    gallery, among = jnp.asarray(padded), np.arange(size) < count
    parts = [
        jax.device_get(top_k(padded[start : start + _ROWS], gallery, _NEIGHBORS, among=among))
        for start in range(0, count, _ROWS)
    ]
    return jax.tree.map(lambda *columns: np.concatenate(columns)[:count], *parts)
