"""The ranked gallery of each query, by the published rules.

Similarities are cosines, accumulated in float64 and rounded to float32, the release's type. So
equal embeddings have equal similarities wherever they stand, and the metrics do not depend on
blocks or threads; the release's own float32 dot products differ from these in the last bit, which
can swap two detections only if they are that close.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from alignps_jax.boxes import iou
from alignps_jax.evaluation import cbgm
from alignps_jax.evaluation.detections_io import rows_of_images
from alignps_jax.types import GalleryDetections, SearchProtocol

# How the cosines are computed, which changes the speed and no result: rows of one matrix product,
# few enough that it stays in the cache, and the cost of fetching one detection for one query, in
# detections of a matrix product.
QUERY_ROWS, GALLERY_ROWS, GATHER_COST = 128, 4096, 16


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The gallery detections of one query (rows of all detections), most similar first."""

    row: Int[np.ndarray, "R"]
    similarity: Float[np.ndarray, "R"]
    is_match: Bool[np.ndarray, "R"]


@dataclasses.dataclass(frozen=True)
class GallerySearch:
    """A protocol, detections of its images, and rules of `config.eval` (`context_matching`)."""

    protocol: SearchProtocol
    detections: GalleryDetections
    score_threshold: float
    context: Sequence[int] = ()

    @cached_property
    def _kept(self) -> Int[np.ndarray, "K"]:
        """Rows of the detections that reach the threshold."""
        return np.flatnonzero(self.detections.scores >= self.score_threshold)

    def rankings(self, queries: Iterable[int]) -> Iterator[tuple[int, Ranking]]:
        """Query after query, its ranked gallery; those whose photo has no detections are left out.

        The gallery of n images is their kept detections end to end, as published: entry i of the
        gallery owns `offsets[i]:offsets[i + 1]` of them.
        """
        rows = {query: row for query in queries if (row := self._query_row(query)) is not None}
        kept_offsets = np.searchsorted(self._kept, self.detections.offsets)
        for start in range(0, len(rows), QUERY_ROWS):
            block = list(rows)[start : start + QUERY_ROWS]
            images = [self.protocol.gallery[query] for query in block]
            kept, offsets = zip(*(rows_of_images(kept_offsets, own) for own in images), strict=True)
            cosines = self._cosines([rows[query] for query in block], kept)
            for query, own, places, similarity in zip(block, kept, offsets, cosines, strict=True):
                gallery = self._kept[own]
                if self.context:
                    (near, limit), found = self.context, self.detections
                    context = cbgm.context_people(found, rows[query], self.score_threshold, limit)
                    asked = context, found.embeddings, near
                    similarity = cbgm.rescore(similarity, gallery, places, *asked)
                yield query, self._ranking(query, gallery, places, similarity)

    def _query_row(self, query: int) -> int | None:
        """The detection with the highest IoU (widths + 1) with the query box, if there is any."""
        photo = self.detections.of(int(self.protocol.query_image[query]))
        if photo.start == photo.stop:
            return None
        # The release counts the last pixel of a box here, and nowhere else.
        last_pixel = np.array([0.0, 0, 1, 1])
        box = self.protocol.query_box[query] + last_pixel
        return photo.start + int(iou(self.detections.boxes[photo] + last_pixel, box).argmax())

    def _ranking(
        self,
        query: int,
        rows: Int[np.ndarray, "R"],
        offsets: Int[np.ndarray, "n_plus_1"],
        similarity: Float[np.ndarray, "R"],
    ) -> Ranking:
        """Ties included as published: images with the person are sorted first, then everything."""
        entries = _positions(self.protocol.gallery[query], self.protocol.target_images[query])
        people = self.protocol.target_boxes[query].astype(float)
        places, own_offsets = rows_of_images(offsets, entries)
        size = people[:, 2:] - people[:, :2]
        needed = np.minimum(0.5, size.prod(axis=1) / (size + 10).prod(axis=1))
        target = np.repeat(np.arange(len(people)), np.diff(own_offsets))
        overlap = iou(self.detections.boxes[rows[places]].astype(float), people[target])
        fits, is_match = np.zeros((2, len(rows)), bool)
        fits[places] = overlap >= needed[target]
        order = np.arange(len(rows))
        for start, stop in zip(offsets[entries], offsets[entries + 1], strict=True):
            order[start:stop] = start + np.argsort(similarity[start:stop])[::-1]
            ranked = order[start:stop]
            is_match[ranked[fits[ranked]][:1]] = True
        order = order[np.argsort(similarity[order])[::-1]]
        return Ranking(rows[order], similarity[order], is_match[order])

    def _cosines(
        self, query_rows: list[int], gallery_rows: Sequence[Int[np.ndarray, "_R"]]
    ) -> Iterator[Float[np.ndarray, "_R"]]:
        """Cosines with each query's gallery, by whichever of the two ways is less work."""
        embeddings, kept = self.detections.embeddings, self._kept
        queries = embeddings[query_rows].astype(np.float64)
        fetched = sum(map(len, gallery_rows))
        if GATHER_COST * fetched < len(queries) * len(kept):
            for query, rows in zip(queries, gallery_rows, strict=True):
                yield (embeddings[kept[rows]].astype(np.float64) @ query).astype(np.float32)
            return
        cosines = np.empty((len(queries), len(kept)), np.float32)
        for start in range(0, len(kept), GALLERY_ROWS):
            part = slice(start, start + GALLERY_ROWS)
            cosines[:, part] = queries @ embeddings[kept[part]].astype(np.float64).T
        yield from (row[rows] for row, rows in zip(cosines, gallery_rows, strict=True))


def _positions(images: Int[np.ndarray, "n"], targets: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """Where each target stands in `images`, its k-th mention at the k-th place."""
    order = np.argsort(images, kind="stable")
    mention = np.tril(targets[:, None] == targets[None, :], -1).sum(axis=1)
    return order[np.searchsorted(images[order], targets) + mention]
