"""One query's gallery, its similarities and its true positives, by the published rules.

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
from jaxtyping import Float, Int

from alignps_jax.boxes import iou
from alignps_jax.evaluation import cbgm
from alignps_jax.evaluation.detections_io import rows_of_images
from alignps_jax.types import GalleryDetections, SearchProtocol

# How the cosines are computed, which changes the speed and no result: rows of one matrix product,
# few enough that it stays in the cache, and the cost of fetching one detection for one query, in
# detections of a matrix product.
QUERY_ROWS, GALLERY_ROWS, GATHER_COST = 128, 4096, 16


@dataclasses.dataclass(frozen=True)
class Gallery:
    """One query's gallery: the kept detections of its n images end to end, as published.

    `rows` are numbers among the kept detections; entry i owns `offsets[i]:offsets[i + 1]` of
    them. `target_positions` are the entries that hold the person.
    """

    rows: Int[np.ndarray, "R"]
    offsets: Int[np.ndarray, "n_plus_1"]
    target_positions: Int[np.ndarray, "T"]
    target_boxes: Float[np.ndarray, "T 4"]

    def ranked(self, position: int, similarity: Float[np.ndarray, "R"]) -> Int[np.ndarray, "C"]:
        """Where the detections of one entry are, most similar first."""
        start, stop = self.offsets[position], self.offsets[position + 1]
        return start + np.argsort(similarity[start:stop])[::-1]


@dataclasses.dataclass(frozen=True)
class GallerySearch:
    """A protocol, the detections, and the rules of `search_metrics`."""

    protocol: SearchProtocol
    detections: GalleryDetections
    score_threshold: float
    context: Sequence[int]

    @cached_property
    def kept_rows(self) -> Int[np.ndarray, "K"]:
        """The detections that reach the threshold."""
        return np.flatnonzero(self.detections.scores >= self.score_threshold)

    @cached_property
    def _kept_offsets(self) -> Int[np.ndarray, "N_plus_1"]:
        return np.searchsorted(self.kept_rows, self.detections.offsets)

    def query_row(self, query: int) -> int | None:
        """The detection with the highest IoU (widths + 1) with the query box, if there is any."""
        photo = self.detections.of(int(self.protocol.query_image[query]))
        if photo.start == photo.stop:
            return None
        # The release counts the last pixel of a box here, and nowhere else.
        last_pixel = np.array([0, 0, 1, 1])
        boxes = exact(self.detections.boxes[photo]) + last_pixel
        box = exact(self.protocol.query_box[query]) + last_pixel
        return photo.start + int(iou(boxes, box).argmax())

    def similarities(
        self, queries: Iterable[int]
    ) -> Iterator[tuple[int, Gallery, Float[np.ndarray, "_R"]]]:
        """Query after query, its gallery and the similarities in the order of `gallery.rows`.

        Queries whose photo has no detections are left out.
        """
        rows = {query: row for query in queries if (row := self.query_row(query)) is not None}
        for start in range(0, len(rows), QUERY_ROWS):
            block = list(rows)[start : start + QUERY_ROWS]
            galleries = [self.gallery(query) for query in block]
            query_rows = [rows[query] for query in block]
            cosines = self._cosines(query_rows, [gallery.rows for gallery in galleries])
            for query, gallery, cosine in zip(block, galleries, cosines, strict=True):
                yield query, gallery, self._in_context(query, rows[query], gallery, cosine)

    def gallery(self, query: int) -> Gallery:
        """The kept detections of a query's gallery images."""
        images = self.protocol.gallery[query]
        rows, offsets = rows_of_images(self._kept_offsets, images)
        positions = _positions(images, self.protocol.target_images[query])
        return Gallery(rows, offsets, positions, self.protocol.target_boxes[query])

    def true_positives(
        self, gallery: Gallery, similarity: Float[np.ndarray, "R"]
    ) -> Int[np.ndarray, "P"]:
        """Where in the gallery's order the true positives are, at most one per target."""
        index, offsets = rows_of_images(gallery.offsets, gallery.target_positions)
        target = np.repeat(np.arange(len(gallery.target_boxes)), np.diff(offsets))
        size = (gallery.target_boxes[:, 2:] - gallery.target_boxes[:, :2]).astype(np.float64)
        needed = np.minimum(0.5, size.prod(axis=1) / (size + 10).prod(axis=1))
        candidates = self.detections.boxes[self.kept_rows[gallery.rows[index]]]
        overlap = iou(exact(candidates), exact(gallery.target_boxes[target]))
        fits = overlap >= needed[target]
        index, target = index[fits], target[fits]
        # Where one detection fits, the order of the image's detections does not matter.
        alone = np.bincount(target)[target] == 1
        matches = list(index[alone])
        for number in np.unique(target[~alone]):
            ranked = gallery.ranked(gallery.target_positions[number], similarity)
            matches.append(ranked[np.isin(ranked, index)][0])
        return np.array(matches, dtype=np.int64)

    def _cosines(
        self, query_rows: list[int], gallery_rows: list[Int[np.ndarray, "_R"]]
    ) -> Iterator[Float[np.ndarray, "_R"]]:
        """Cosines with each query's gallery, by whichever of the two ways is less work."""
        embeddings, kept = self.detections.embeddings, self.kept_rows
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

    def _in_context(
        self, query: int, query_row: int, gallery: Gallery, similarity: Float[np.ndarray, "R"]
    ) -> Float[np.ndarray, "R"]:
        """The similarities, rescored by the context if that was asked for."""
        if not self.context:
            return similarity
        (images, limit), found = self.context, self.detections
        photo = int(self.protocol.query_image[query])
        people = cbgm.context_people(found, photo, query_row, self.score_threshold, limit)
        rows = self.kept_rows[gallery.rows]
        return cbgm.rescore(similarity, rows, gallery.offsets, people, found.embeddings, images)


def _positions(images: Int[np.ndarray, "n"], targets: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """Where each target stands in `images`, its k-th mention at the k-th place."""
    order = np.argsort(images, kind="stable")
    mention = np.tril(targets[:, None] == targets[None, :], -1).sum(axis=1)
    return order[np.searchsorted(images[order], targets) + mention]


def published_order(gallery: Gallery, similarity: Float[np.ndarray, "R"]) -> Int[np.ndarray, "R"]:
    """The ranking, ties included: images with the person are sorted first, then everything."""
    order = np.arange(len(similarity))
    for position in gallery.target_positions:
        start, stop = gallery.offsets[position], gallery.offsets[position + 1]
        order[start:stop] = gallery.ranked(position, similarity)
    return order[np.argsort(similarity[order])[::-1]]


def exact(boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
    """The boxes in float64, in which the released evaluation compares overlaps."""
    return boxes.astype(np.float64)
