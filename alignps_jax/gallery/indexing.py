"""Finds everybody in photos and videos and stores them: `--mode=index`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.devices import use_compilation_cache
from alignps_jax.gallery.claims import Claims
from alignps_jax.gallery.entries import folder_range
from alignps_jax.gallery.forgotten import Forgotten
from alignps_jax.gallery.query import above
from alignps_jax.gallery.reading import SceneRead, Task, file_tasks
from alignps_jax.gallery.store import EXACT_UP_TO, Gallery
from alignps_jax.gallery.table import IndexedScene
from alignps_jax.gallery.writing import (
    KnownFile,
    commit_scenes,
    known_files,
    remove_files,
    tidy,
)
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import Photo, detect_all
from alignps_jax.log import progress
from alignps_jax.media.walk import MediaFile, Walk, media_files
from alignps_jax.types import UserError

# What a kill can cost, and what one commit holds at most.
COMMIT_SECONDS, _COMMIT_SCENES = 5.0, 1024
# A commit makes small files, which many make slow.
TIDY_COMMITS = 200


@dataclasses.dataclass
class Indexed:
    """What an indexing run did, in numbers of files and people.

    Attributes:
      found: files below the source.
      known: files that were in the gallery as they are.
      scenes, people: that were added.
      removed: files that are gone, and were removed.
      skipped: files that could not be read (completely), with reasons.
    """

    found: int = 0
    known: int = 0
    scenes: int = 0
    people: int = 0
    removed: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    walk: Walk = dataclasses.field(default_factory=Walk)


def index_source(
    checkpoint: Path,
    config: ConfigDict,
    address: str,
    source: str,
    *,
    every: float,
    prune: bool,
    exact_up_to: int = EXACT_UP_TO,
) -> None:
    """Finds everybody in the photos and videos of `source` and adds them to a gallery.

    Args:
      checkpoint: of the network.
      config: what to use it with, mostly its own.
      address: the gallery, made if there is none.
      source: a folder, photo or video.
      every: seconds between the frames of a video that are looked at.
      prune: remove what was found below `source` in files that are not there any more.
      exact_up_to: beyond so many people, an index for the search is made.

    Raises:
      UserError: the checkpoint, source or gallery is wrong, or the gallery cannot be written.
      IncompleteError: all is done, but some files could not be read.
    """
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    gallery = Gallery.open(address, create_for=detector, exact_up_to=exact_up_to)
    done = index(gallery, detector, [source], every, prune)
    print(
        f"found {done.people:,} people (scores >= {config.eval.score_threshold:g}) in "
        f"{done.scenes:,} photos and frames; {done.known:,} of {done.found:,} files were known"
        + (f"; removed {done.removed:,} that are gone" if prune else "")
    )
    print(f"gallery  {address}: {gallery.num_people:,} people in {gallery.num_scenes:,} scenes")
    done.walk.report()


def index(
    gallery: Gallery,
    detector: Detector,
    sources: Sequence[str],
    every: float = 1.0,
    prune: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
) -> Indexed:
    """`index_source` with an open gallery and detector, without words at the end.

    What was found is committed every so many seconds.
    """
    gallery.check_detector(detector)
    done = Indexed()
    forgotten = Forgotten(gallery)
    forgotten.refresh()
    walk = media_files(sources)
    skipped = walk.skipped
    files = [dataclasses.replace(f, path=os.path.realpath(f.path)) for f in walk.files]
    known, away = known_files(gallery), forgotten.files()
    pending = [
        file
        for file in files
        if file.path not in away and not is_known(known.get(file.path), file, every)
    ]
    done.found, done.known, done.skipped = len(files), len(files) - len(pending), skipped
    done.walk = walk
    if prune:
        done.removed = _prune(gallery, sources, known, {file.path for file in files}, skipped)
    if pending:
        _Run(gallery, detector, forgotten, every, commit_seconds, done).go(pending)
    if pending or done.removed:
        tidy(gallery)
    return done


def is_known(known: KnownFile | None, file: MediaFile, every: float) -> bool:
    """Whether a gallery holds all of a file as it is now."""
    if known is None or (known.size, known.mtime) != (file.size, file.mtime):
        return False
    return not file.is_video or (known.every == every and known.seconds is None)


class _Run:
    """Indexes files that are not known."""

    def __init__(
        self,
        gallery: Gallery,
        detector: Detector,
        forgotten: Forgotten,
        every: float,
        commit_seconds: float,
        done: Indexed,
    ):
        self._gallery, self._detector, self._forgotten = gallery, detector, forgotten
        self._every, self._done = every, done
        self._commit_seconds = commit_seconds
        self._commits = 0
        self._writer = ThreadPoolExecutor(1, "commit")
        self._under_way: Future[None] = self._writer.submit(lambda: None)
        self._threshold = gallery.about.score_threshold
        self._ready: list[IndexedScene] = []
        self._committed = time.monotonic()

    def go(self, files: Sequence[MediaFile]) -> None:
        detector = self._detector
        with (
            Claims(self._gallery) as claims,
            self._writer,
            progress(desc="index", unit="file", total=len(files)) as bar,
        ):
            # An empty share asks for the commit of those before it.
            for _, shares in itertools.groupby(claims.shares(files, self._missing), bool):
                tasks = self._tasks(itertools.chain.from_iterable(shares))
                photos = detect_all(
                    detector.detect_batch, detector.config.data, detector.rows, tasks
                )
                with contextlib.closing(photos):
                    for photo in photos:
                        self._take(photo, bar)
                self._commit().result()
            bar.update(len(files) - bar.n)  # those that other processes did

    def _tasks(self, files: Iterable[MediaFile]) -> Iterator[Task]:
        max_pixels = self._gallery.about.max_pixels
        for file in files:
            known = self._known_seconds(file) if file.is_video else ()
            yield from file_tasks(file, self._every, max_pixels, known)

    def _missing(self, files: Sequence[MediaFile]) -> list[MediaFile]:
        known = known_files(self._gallery, [file.path for file in files])
        return [file for file in files if not is_known(known.get(file.path), file, self._every)]

    def _known_seconds(self, file: MediaFile) -> frozenset[float]:
        known = known_files(self._gallery, [file.path]).get(file.path)
        same = known is not None and (known.size, known.mtime) == (file.size, file.mtime)
        if known is None or not same or known.every != self._every:
            return frozenset()
        return known.seconds or frozenset()

    def _take(self, photo: Photo[SceneRead], bar: Any) -> None:
        read, found = photo.tag, photo.found
        if found is None or read.scene is None or read.state is None:
            self._done.skipped[read.file.path] = str(photo.error)
        else:
            people = above(found, self._threshold)
            one = IndexedScene(read.scene, read.state, people, read.every, read.final)
            self._ready.append(one)
            self._done.scenes += 1
            self._done.people += len(people.scores)
        if read.final:
            bar.set_postfix_str(f"{self._done.people:,} people", refresh=False)
            bar.update()
        late = time.monotonic() - self._committed > self._commit_seconds
        if late or len(self._ready) >= _COMMIT_SCENES:
            self._commit()

    def _commit(self) -> Future[None]:
        """Commits what is ready while the network works; raises what the last commit raised."""
        self._under_way.result()
        self._under_way = self._writer.submit(self._write, self._ready)
        self._ready = []
        self._committed = time.monotonic()
        return self._under_way

    def _write(self, scenes: Sequence[IndexedScene]) -> None:
        commit_scenes(self._gallery, self._forgotten.without(scenes))
        self._commits += 1
        if self._commits % TIDY_COMMITS == 0:
            tidy(self._gallery, make_indices=False)


def _prune(
    gallery: Gallery,
    sources: Sequence[str],
    known: Iterable[str],
    there: set[str],
    skipped: dict[str, str],
) -> int:
    """Removes known files below the sources that are gone; not those that may only be hidden."""
    below = [known_below(known, source) for source in sources]
    gone = {
        path
        for path in set().union(*below) - there
        if not os.path.lexists(path) and not _is_hidden(path, skipped)
    }
    if gone and not there:
        raise UserError(
            f"--prune: found no photo or video below {sources[0]}, expected at least one before "
            f"{len(gone):,} known files are removed"
        )
    remove_files(gallery, gone)
    return len(gone)


def known_below(known: Iterable[str], source: str) -> set[str]:
    """The known files below a folder, or the source itself."""
    low, high = folder_range(source)
    return {path for path in known if low <= path < high or path == os.path.realpath(source)}


def _is_hidden(path: str, skipped: Iterable[str]) -> bool:
    """Whether a file lies in a folder that could not be read."""
    return any(path.startswith(f"{folder}/") for folder in skipped)
