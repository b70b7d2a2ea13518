"""Finds everybody in photos and videos and stores them: `--mode=index`."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Scene, scene_id
from alignps_jax.gallery.forget import Forgotten
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.memory import fits
from alignps_jax.gallery.people import FileState, FoundScene
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import Photo, detect_all, shot_photo
from alignps_jax.log import progress
from alignps_jax.media.walk import DEFAULT_EXCLUDES, MediaFile, Shot, Walk, media_files, shots

# What a kill can cost, and what one commit holds at most.
COMMIT_SECONDS, _COMMIT_SCENES = 5.0, 1024
# A commit makes small files, which many make slow.
_TIDY_COMMITS = 200

Results = Iterator[Photo[Shot]]
Detect = Callable[["Reading", Sequence[MediaFile]], Results]


@dataclasses.dataclass
class Indexed:
    """What an indexing run did so far.

    That is, `walk` has the files, those that could not be read (completely), and other types;
    `known` files were in the gallery as they are, `done` were read, `removed` are gone; `scenes`
    and `people` were added; `unsound` detections were left out since they are not finite.
    """

    walk: Walk
    known: int = 0
    done: int = 0
    scenes: int = 0
    people: int = 0
    removed: int = 0
    unsound: int = 0


@dataclasses.dataclass
class Reading:
    """How files are read, in whatever process.

    `every`: seconds between frames of a video; `seen`: for each content the last second that is
    known, infinity where it is complete.
    """

    every: float
    max_pixels: int
    seen: dict[str, float]

    def detect(self, detector: Detector, files: Iterable[MediaFile]) -> Results:
        """The people of files in their order; of contents that are known, no more than that."""
        tasks = (
            partial(shot_photo, task)
            for file in files
            for task in shots(file, self.every, self.max_pixels, self.seen)
        )
        return detect_all(detector.detect_batch, detector.config.data, detector.rows, tasks)


def index(
    gallery: Gallery,
    sources: Sequence[str],
    every: float = 1.0,
    prune: bool = False,
    excludes: Sequence[str] = DEFAULT_EXCLUDES,
    report: Callable[[Indexed], None] = lambda done: None,
    detect: Detect | None = None,
    commit_seconds: float = COMMIT_SECONDS,
) -> Indexed:
    """Finds everybody in files that a gallery does not know as they are, and adds them.

    Args:
      gallery: with a detector.
      sources: folders, photos or videos; UserError if one does not exist.
      every: seconds between the frames of a video that are looked at.
      prune: remove what was found below the sources in files that are not there any more.
      excludes: patterns of files and folders to leave out.
      report: called with what was done so far, after each file.
      detect: reads files and finds people elsewhere, in any order of the files.
      commit_seconds: how often what was found is committed.
    """
    detector, people = gallery.own_detector(), gallery.people
    with people.only_writer(), ThreadPoolExecutor(1, "commit") as writer:
        walk = media_files(sources, excludes)
        people.remove_strays()
        run = _Run(gallery, every, Indexed(walk))
        pending = [file for file in walk.files if not run.is_known(file)]
        run.done.known = len(walk.files) - len(pending)
        if prune:
            run.prune(sources)
        reading = Reading(every, gallery.info.max_pixels, run.seen)
        under_way = writer.submit(lambda: None)
        found = detect(reading, pending) if detect else reading.detect(detector, pending)
        results = run.counted(found, report)
        for batch in _batches(results, commit_seconds):
            under_way.result()  # the network works while the last batch is committed
            under_way = writer.submit(run.commit, batch)
        under_way.result()
        if pending or run.done.removed:
            run.finish()
    return run.done


def index_source(gallery: Gallery, sources: Sequence[str], **options: Any) -> Walk:
    """The same with a progress bar and a summary; gives what to report at the end."""
    with progress(desc="index", unit="file") as bar:

        def report(done: Indexed) -> None:
            bar.total = len(done.walk.files) - done.known
            bar.set_postfix_str(f"{done.people:,} people", refresh=False)
            bar.update(done.done - bar.n)

        done = index(gallery, sources, report=report, **options)
    whom = f"{done.people:,} people (scores >= {gallery.info.score_threshold:g})"
    known = f"{done.known:,} of {len(done.walk.files):,} files were known"
    gone = f"; removed {done.removed:,} that are gone" if options.get("prune") else ""
    print(f"found {whom} in {done.scenes:,} photos and frames; {known}{gone}")
    if done.unsound:
        print(f"note: left out {done.unsound:,} detections with numbers that are not finite")
    return done.walk


def _batches(results: Results, seconds: float) -> Iterator[list[Photo[Shot]]]:
    """The results of some seconds at a time."""
    ready, begin = [], time.monotonic()
    for result in results:
        ready.append(result)
        if time.monotonic() - begin > seconds or len(ready) >= _COMMIT_SCENES:
            yield ready
            ready, begin = [], time.monotonic()
    if ready:
        yield ready


class _Run:
    """What an indexing run knows of its gallery."""

    def __init__(self, gallery: Gallery, every: float, done: Indexed):
        self._people, self._every, self.done = gallery.people, every, done
        self._known = self._people.known_files()
        self._forgotten = Forgotten(self._people)
        self.seen = self._seen()
        self._added: set[str] = set()  # contents of the files that were read
        self._commits = 0

    def is_known(self, file: MediaFile) -> bool:
        """Whether there is nothing to do for a file."""
        known = self._known.get(file.path)
        if known is None or file.path in self._forgotten.paths:
            return known is not None
        same = (known.size, known.mtime) == (file.size, file.mtime)
        return same and known.complete and known.every in (0, self._every)

    def _seen(self) -> dict[str, float]:
        """For each content the last second that is known; see `Reading`."""
        seen = dict.fromkeys(self._forgotten.hashes, math.inf)
        for state in self._known.values():
            if state.complete and state.every in (0, self._every):
                seen[state.hash] = math.inf
            elif not state.complete and state.every == self._every:
                frames = self._people.scenes.rows(["second"], hash=[state.hash])
                seen.setdefault(state.hash, max(frames["second"].to_pylist(), default=-1.0))
        return seen

    def counted(self, results: Results, report: Callable[[Indexed], None]) -> Results:
        """The same results; counts files, and lists those that could not be read."""
        for result in results:
            if result.error is not None:
                self.done.walk.skipped[result.tag.file.path] = str(result.error)
            self.done.done += result.tag.final
            yield result
            if result.tag.final:
                report(self.done)

    def commit(self, results: Sequence[Photo[Shot]]) -> None:
        """Stores the scenes and states of files."""
        self._forgotten.refresh()
        good = [result for result in results if result.error is None]
        files = {one.tag.file.path: self._state(one.tag) for one in good}
        found = map(self._found, good)
        scenes = [scene for one in found if one and (scene := self._forgotten.without(one))]
        stale = [(known, files[path]) for path in files if (known := self._known.pop(path, None))]
        # Videos that were looked at at another interval.
        other = {new.hash for old, new in stale if old.hash == new.hash and old.every != new.every}
        self._people.remove(other)
        self._people.commit(scenes, list(files.values()))
        self._people.settle({old.hash for old, new in stale if old.hash != new.hash})
        if self._forgotten.refresh():  # somebody was forgotten meanwhile
            self._forgotten.enforce()
        # Copies that come later need not be looked at.
        self._added |= {state.hash for state in files.values()}
        self.seen |= {state.hash: math.inf for state in files.values() if state.complete}
        self.done.scenes += len(scenes)
        self.done.people += sum(len(found.people.scores) for found in scenes)
        self._commits += 1
        if self._commits % _TIDY_COMMITS == 0:
            self._people.optimize()

    def _state(self, shot: Shot) -> FileState:
        file, every = shot.file, self._every if shot.file.is_video else 0.0
        return FileState(file.path, file.size, file.mtime, shot.hash, every, shot.final)

    def _found(self, result: Photo[Shot]) -> FoundScene | None:
        """A scene without people of a low score or with numbers that are not finite."""
        shot, found = result.tag, result.found
        if found is None:
            return None
        numbers = np.column_stack([found.boxes, found.scores, found.embeddings])
        sound = np.isfinite(numbers).all(axis=1)
        self.done.unsound += int((~sound).sum())
        sound &= np.asarray(found.scores) >= self._people.info.score_threshold
        people = jax.tree.map(lambda x: np.asarray(x)[sound], found)
        about = *shot.size, shot.taken, shot.camera, shot.second, shot.hash
        scene = Scene(scene_id(shot.hash, shot.second), shot.file.path, *about)
        return FoundScene(scene, people, self._every if shot.file.is_video else 0.0)

    def prune(self, sources: Sequence[str]) -> None:
        """Removes known files below the sources that are gone; not those that may be hidden."""
        there = {file.path for file in self.done.walk.files}
        below = tuple(os.path.join(os.path.abspath(source), "") for source in sources)
        hidden = tuple(os.path.join(folder, "") for folder in self.done.walk.skipped)
        gone = {
            path
            for path in self._known.keys() - there
            if f"{path}/".startswith(below) and not path.startswith(hidden)
            if not os.path.lexists(path)
        }
        if gone and not there:
            raise UserError(
                f"--prune: found no photo or video below {sources[0]}, expected at least one "
                f"before {len(gone):,} known files are removed"
            )
        self._people.remove_files(gone)
        self.done.removed = len(gone)

    def finish(self) -> None:
        """Tidies; files that were renamed lose their old names; makes the vector index.

        That is for more people than fit into memory, and anew when they have doubled.
        """
        gone = (path for path, state in self._known.items() if state.hash in self._added)
        self._people.remove_files({path for path in gone if not os.path.lexists(path)})
        self._people.optimize()
        count, trained = self._people.table.count(), self._people.trained()
        if not fits(count, self._people.info.dim) and count >= 2 * trained.get("people", 0):
            self._people.train()
