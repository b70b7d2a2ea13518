"""Person search in a folder of one's own photos."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.devices import gather_rows, use_compilation_cache
from alignps_jax.distributed import (
    broadcast_from_main,
    gather,
    is_main_process,
    is_multiprocess,
    main_process_first,
)
from alignps_jax.drawing.pictures import Result, grid_picture, picture_row
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
from alignps_jax.log import progress
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
    with, mostly its own. Several processes share the photos, and process 0 writes.

    Raises:
      UserError: the query photo or no photo of the gallery can be read, nobody is found in the
        query photo or its box, or the results cannot be written.
      IncompleteError: all is done, but some photos of the gallery could not be read.
    """
    with main_process_first():
        search = Search.begin(config, query, box, workdir)
    own_names = [path.name for path in gallery_photos(gallery, query)] if is_main_process() else []
    names = broadcast_from_main(own_names)
    photos = [gallery / name for name in names]
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    if is_main_process():
        print(
            f"checkpoint: step {detector.step} of {checkpoint}, chosen by "
            f"{chosen_step(checkpoint, config)[1]}"
        )
    with main_process_first():  # the others find its compiled program
        queries = search.people(detector)
    reader, max_pixels = GalleryReader(), config.data.max_pixels
    own = photos[jax.process_index() :: jax.process_count()]
    shown = progress(own, desc="search", unit="photo", disable=not is_main_process())
    found = {
        path: above(detector.detect(image), search.threshold)
        for path, image in reader.readable(shown, max_pixels)
    }
    reader.join_peers()
    reader.check()
    read = [path for path in photos if path not in reader.skipped]
    people = _of_all_processes(found, read, queries[0])
    if is_main_process():
        rankings = rank(queries, query, people)
        drawn = rankings[:MAX_PICTURE_QUERIES]
        count = sum(len(detections.scores) for detections in people.values())
        search.write(
            rankings,
            lambda: draw_rankings(drawn, gallery, search.photo, max_pixels),
            f"searched {len(queries)} of {query.name} among {count} people (scores >= "
            f"{search.threshold:g}) in {len(people)} photos of {gallery}",
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
        yield from self.readable(photos, max_pixels)
        self.check()

    def readable(self, photos: Iterable[Path], max_pixels: int) -> Iterator[tuple[Path, Image]]:
        """The same, where there may be none: in a share of the photos."""
        for path in photos:
            try:
                image = read_image(path, max_pixels)
            except UserError as error:
                self.skipped[path] = str(error)
                continue
            self._read.add(path)
            yield path, image

    def join_peers(self) -> None:
        """Takes in what the other processes of the run read and skipped."""
        skipped = {str(path): reason for path, reason in self.skipped.items()}
        for read, reasons in gather((list(map(str, self._read)), skipped)):
            self._read.update(map(Path, read))
            self.skipped |= {Path(name): reason for name, reason in reasons.items()}
        self.skipped = dict(sorted(self.skipped.items()))

    def check(self) -> None:
        """Raises UserError if photos were skipped, and none was read."""
        if self.skipped and not self._read:
            first = next(iter(self.skipped.values()))
            raise UserError(
                f"--gallery: found no photo that can be read among {len(self.skipped):,}, expected "
                f"at least one; the first: {first}"
            )

    def finish(self) -> None:
        """Lists the photos that were skipped, in process 0; called when all results are written.

        Raises:
          IncompleteError: there are any.
        """
        if not self.skipped:
            return
        if is_main_process():
            print("skipped:", *self.skipped.values(), sep="\n  ")
        raise IncompleteError(
            f"--gallery: skipped {len(self.skipped):,} of "
            f"{len(self._read.union(self.skipped)):,} photos, which are listed above; the results "
            "are complete without them"
        )


def _of_all_processes(
    found: Mapping[Path, Detections], photos: Sequence[Path], query: Query
) -> dict[Path, Detections]:
    """What all processes of the run found in these photos, in their order, given each one's own."""
    if not is_multiprocess():
        return dict(found)
    nobody = Detections(
        boxes=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        embeddings=np.zeros((0, len(query.embedding)), np.float32),
        valid=np.zeros(0, bool),
    )
    number = {path: index for index, path in enumerate(photos)}
    own = [np.full(len(people.scores), number[path]) for path, people in found.items()]
    index, people = gather_rows(
        jax.tree.map(
            lambda *rows: np.concatenate(rows),
            (np.zeros(0, np.int32), nobody),
            *zip(own, found.values(), strict=True),
        )
    )
    return {
        path: jax.tree.map(lambda rows, one=one: rows[index == one], people)
        for path, one in number.items()
    }


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
    return grid_picture(
        photos_row(ranking, gallery, photo, "query", max_pixels) for ranking in rankings
    )


def photos_row(
    ranking: QueryRanking,
    gallery: Path,
    photo: Image,
    title: str,
    max_pixels: int,
) -> list[Image]:
    """A query in its photo, below a title, and its first results in those of a folder."""
    results = (
        Result(read_image(gallery / one.image, max_pixels), one.image, one.box, one.similarity)
        for one in ranking.results
    )
    return picture_row(title, photo, ranking.image, ranking.box, results)
