"""Rankings of a data set's queries as rows of a picture."""

from __future__ import annotations

from alignps_jax.drawing.rankings import PictureRow, Result, picture_row
from alignps_jax.evaluation.metrics import Ranking
from alignps_jax.types import SearchProtocol
from data_pipeline.datasets import PreparedSplit
from data_pipeline.pipeline import photo_of


def protocol_row(
    split: PreparedSplit, protocol: SearchProtocol, ranking: Ranking, query: int, title: str
) -> PictureRow:
    """A query of a protocol, below a title, and its first results.

    Args:
      split: the photos that the protocol's image indices count.
      protocol: where the query is number `query`.
      ranking: what was found for it.
      query: its number.
      title: stands above the query.
    """
    names = split.annotations.names
    found = zip(ranking.image, ranking.boxes, ranking.similarity, ranking.is_match, strict=True)
    results = (
        Result(photo_of(split, image), names[image], box, float(similarity), bool(is_match))
        for image, box, similarity, is_match in found
    )
    image = int(protocol.query_image[query])
    box = protocol.query_box[query]
    return picture_row(title, photo_of(split, image), names[image], box, results)
