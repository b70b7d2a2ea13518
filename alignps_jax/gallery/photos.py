"""Person search in a folder of one's own photos."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import chosen_by
from alignps_jax.devices import own_cache, use_compilation_cache
from alignps_jax.drawing.rankings import PictureRow, Result, picture_row, ranking_picture
from alignps_jax.files import Image, read_image
from alignps_jax.gallery.nearest import top_k
from alignps_jax.gallery.query import (
    MAX_PICTURE_QUERIES,
    MAX_RESULTS,
    FoundPerson,
    Query,
    QueryRanking,
    Search,
    above,
)
from alignps_jax.inference.detector import Detector
from alignps_jax.progress import progress
from alignps_jax.types import Detections, IncompleteError, UserError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def search_photos(
    checkpoint: Path,
    config: ConfigDict,
    query: Path,
    box: Sequence[float] | None,
    gallery: Path,
    workdir: Path,
) -> None:
    """Searches the person in `box` of a photo, or everybody in it, in a folder of photos.

    Writes `ranking.json` and `ranking.png` to `workdir`. `config` is what to use the checkpoint
    with, mostly its own.

    Raises:
      UserError: the query photo or no photo of the gallery can be read, nobody is found in the
        query photo or its box, or the results cannot be written.
      IncompleteError: all is done, but some photos of the gallery could not be read.
    """
    search = Search.begin(config, query, box, workdir)
    photos = gallery_photos(gallery, query)
    use_compilation_cache(own_cache())
    detector = Detector.from_checkpoint(checkpoint, config)
    print(f"checkpoint: step {detector.step} of {checkpoint}, chosen by {chosen_by(checkpoint)}")
    queries, max_pixels = search.people(detector), config.data.max_pixels
    reader, shown = GalleryReader(), progress(photos, desc="search", unit="photo")
    found = {
        path: above(detector.detect(image), search.threshold)
        for path, image in reader.read(shown, max_pixels)
    }
    rankings = rank(queries, query, found)
    drawn = rankings[:MAX_PICTURE_QUERIES]
    people = sum(len(detections.scores) for detections in found.values())
    search.write(
        rankings,
        lambda: draw_rankings(drawn, gallery, search.photo, max_pixels),
        f"searched {len(queries)} of {query.name} among {people} people (scores >= "
        f"{search.threshold:g}) in {len(found)} photos of {gallery}",
    )
    reader.finish()


class GalleryReader:
    """Reads the photos of a gallery; one that cannot be read costs nothing but itself.

    Attributes:
      skipped: why each photo that could not be read could not, in a line.
    """

    def __init__(self) -> None:
        self.skipped: dict[Path, str] = {}
        self._read: set[Path] = set()

    def read(self, photos: Iterable[Path], max_pixels: int) -> Iterator[tuple[Path, Image]]:
        """The photos that can be read and have no more pixels than that, each with its pixels.

        Raises:
          UserError: there is none.
        """
        for path in photos:
            try:
                image = read_image(path, max_pixels)
            except UserError as error:
                self.skipped[path] = str(error)
                continue
            self._read.add(path)
            yield path, image
        if self.skipped and not self._read:
            first = next(iter(self.skipped.values()))
            raise UserError(
                f"--gallery: found no photo that can be read among {len(self.skipped):,}, expected "
                f"at least one; the first: {first}"
            )

    def finish(self) -> None:
        """Lists the photos that were skipped; to be called when all results are written.

        Raises:
          IncompleteError: there are any.
        """
        if not self.skipped:
            return
        print("skipped:")
        for reason in self.skipped.values():
            print(f"  {reason}")
        raise IncompleteError(
            f"--gallery: skipped {len(self.skipped):,} of "
            f"{len(self._read.union(self.skipped)):,} photos, which are listed above; the results "
            "are complete without them"
        )


def gallery_photos(gallery: Path, query: Path) -> list[Path]:
    """The photos of a folder, by name, without the query photo itself."""
    try:
        names = sorted(os.listdir(gallery))
    except OSError as error:
        raise UserError(
            f"--gallery: found {gallery}, which cannot be read ({error.strerror}), expected a "
            "gallery that --mode=index made, or a folder of photos"
        ) from error
    itself = os.path.realpath(query)
    photos = [
        gallery / name
        for name in names
        if Path(name).suffix.lower() in PHOTO_SUFFIXES
        and os.path.realpath(gallery / name) != itself
    ]
    if not photos:
        raise UserError(
            f"--gallery: found no photos in {gallery}, expected {', '.join(PHOTO_SUFFIXES)} files "
            "besides the query"
        )
    return photos


def rank(
    queries: Sequence[Query],
    photo: Path,
    found: Mapping[Path, Detections],
    max_results: int = MAX_RESULTS,
) -> list[QueryRanking]:
    """For each query the `max_results` people of the gallery that are most similar, best first."""
    people = [
        (path.name, box, float(score))
        for path, detections in found.items()
        for box, score in zip(detections.boxes, detections.scores, strict=True)
    ]
    if not people:
        return [QueryRanking(photo.name, query.box, ()) for query in queries]
    nearest = jax.device_get(
        top_k(
            np.stack([query.embedding for query in queries]),
            np.concatenate([detections.embeddings for detections in found.values()]),
            min(len(people), max_results),
        )
    )
    rankings = []
    for query, rows, similarities in zip(queries, nearest.index, nearest.similarity, strict=True):
        results = []
        for row, similarity in zip(rows, similarities, strict=True):
            name, box, score = people[row]
            results.append(FoundPerson(name, box, float(similarity), score))
        rankings.append(QueryRanking(photo.name, query.box, tuple(results)))
    return rankings


def draw_rankings(
    rankings: Sequence[QueryRanking],
    gallery: Path,
    photo: Image,
    max_pixels: int,
) -> Image:
    """The queries and their first results."""
    return ranking_picture(
        photos_row(ranking, gallery, photo, "query", max_pixels) for ranking in rankings
    )


def photos_row(
    ranking: QueryRanking,
    gallery: Path,
    photo: Image,
    title: str,
    max_pixels: int,
) -> PictureRow:
    """A query in its photo, below a title, and its first results in those of a folder."""
    results = (
        Result(read_image(gallery / one.image, max_pixels), one.image, one.box, one.similarity)
        for one in ranking.results
    )
    return picture_row(title, photo, ranking.image, ranking.box, results)
