"""Finds everybody in photos and videos and stores them: `--mode=index`."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Scene, scene_id
from alignps_jax.gallery.forget import Forgotten
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.memory import fits
from alignps_jax.gallery.people import FileState, FoundScene, People
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import Photo, detect_all, shot_photo
from alignps_jax.log import progress
from alignps_jax.media import DEFAULT_EXCLUDES, Shot, Walk, is_video, shots
from alignps_jax.types import Detections

COMMIT_SECONDS = 5.0  # what a kill can cost
_TIDY_COMMITS = 200  # each makes small files, which many make slow

Results = Iterator[Photo[Shot]]
Find = Callable[[Detector, Iterable[str]], Results]


@dataclasses.dataclass
class Indexed:
    """What an indexing run did so far.

    `known` files of `walk` were in the gallery as they are, `done` were read, `removed` are gone;
    `scenes` and `people` were added, `unsound` detections left out since they are not finite.
    """

    walk: Walk
    known: int = 0
    done: int = 0
    scenes: int = 0
    people: int = 0
    removed: int = 0
    unsound: int = 0

    def __str__(self) -> str:
        known = (
            f"{self.known:,} of {len(self.walk.files):,} files were known, {self.removed:,} gone"
        )
        found = f"found {self.people:,} people in {self.scenes:,} photos and frames; {known}"
        return found + f"; {self.unsound:,} detections were not finite" * (self.unsound > 0)


def find_people(
    detector: Detector, paths: Iterable[str], every: float, seen: Mapping[str, float]
) -> Results:
    """The people of files, in the order of the files.

    `every`: seconds between frames of a video; `seen`: for each content the last second that is
    known and need not be looked at, infinity where all is.
    """
    data = detector.config.data
    tasks = (shots(path, every, data.max_pixels, seen) for path in paths)
    photos = (partial(shot_photo, task) for some in tasks for task in some)
    return detect_all(detector.detect_batch, data, detector.rows, photos)


def index(
    gallery: Gallery,
    sources: Sequence[str],
    every: float = 1.0,
    prune: bool = False,
    excludes: Sequence[str] = DEFAULT_EXCLUDES,
    report: Callable[[Indexed], None] = lambda done: None,
    detect: Callable[[Find, Sequence[str]], Results] | None = None,
) -> Indexed:
    """Finds everybody in files that a gallery does not know as they are, and adds them.

    One frame of a video is searched per `every` seconds. `prune` removes the people of files below
    the sources that are gone; `excludes` are patterns of files and folders to leave out.
    `report` is called now and then and in the end; `detect` finds people elsewhere, in any order of
    the files. UserError if a source does not exist.
    """
    detector, people = gallery.own_detector(), gallery.people
    with people.only_writer(), ThreadPoolExecutor(1, "commit") as writer:
        people.remove_strays()
        run = _Run(people, every, Indexed(Walk(sources, excludes)))
        pending = [path for path in run.done.walk.files if not run.is_known(path)]
        run.done.known = len(run.done.walk.files) - len(pending)
        find: Find = partial(find_people, every=every, seen=run.seen)
        results = detect(find, pending) if detect else find(detector, pending)
        under_way = writer.submit(lambda: None)
        with progress(desc="index", unit="file", total=len(pending)) as bar:
            for batch in run.batches(results):
                bar.update(run.done.done - bar.n)
                report(run.done)
                under_way.result()  # the network works while the last batch is committed
                under_way = writer.submit(run.commit, batch)
        under_way.result()
        if pending or prune:
            run.finish(sources if prune else ())
    report(run.done)
    return run.done


class _Run:
    """What an indexing run knows of its gallery; `seen` as in `find_people`."""

    def __init__(self, people: People, every: float, done: Indexed):
        self._people, self._every, self.done = people, every, done
        self._known, self._forgotten = people.known_files(), Forgotten(people)
        self._added: set[str] = set()  # contents of the files that were read
        self._commits = 0
        self.seen = dict.fromkeys(self._forgotten.hashes, math.inf)
        for state in self._known.values():
            if self._is_complete(state):
                self.seen[state.hash] = math.inf
            elif not state.complete and state.every == every:
                frames = people.scenes.rows(["second"], hash=[state.hash])
                self.seen.setdefault(state.hash, max(frames["second"].to_pylist(), default=-1.0))

    def _is_complete(self, state: FileState) -> bool:
        return state.complete and state.every in (0, self._every)

    def is_known(self, path: str) -> bool:
        """Whether there is nothing to do for a file."""
        if not (known := self._known.get(path)):
            return False
        same = (known.size, known.mtime) == self.done.walk.files[path]
        return path in self._forgotten.paths or (same and self._is_complete(known))

    def batches(self, results: Results) -> Iterator[list[Photo[Shot]]]:
        """The results of some seconds at a time; lists files that could not be read."""
        ready, begin = [], time.monotonic()
        for one in results:
            self.done.done += one.tag.second is None
            if one.error is None:
                ready.append(one)
            else:
                self.done.walk.skipped[one.tag.path] = str(one.error)
            if time.monotonic() - begin > COMMIT_SECONDS:
                yield ready
                ready, begin = [], time.monotonic()
        yield ready

    def commit(self, results: Sequence[Photo[Shot]]) -> None:
        """Stores the scenes and states of files."""
        self._forgotten.refresh()
        files, scenes = dict[str, FileState](), dict[str, FoundScene]()
        for one in results:
            shot, path = one.tag, one.tag.path
            every, complete = self._every if is_video(path) else 0.0, shot.second is None
            state = FileState(path, *self.done.walk.files[path], shot.hash, every, complete)
            files[path] = state
            if one.found is not None:
                found = self._forgotten.without(self._scene(shot, one.found, every))
                if found:  # once of copies that were read together
                    scenes.setdefault(found.scene.id, found)
        stale = [(old, new) for path, new in files.items() if (old := self._known.pop(path, None))]
        # Videos that were looked at at another interval.
        self._people.remove(
            {old.hash for old, new in stale if old.hash == new.hash and old.every != new.every}
        )
        self._people.commit(list(scenes.values()), list(files.values()))
        self._people.settle({old.hash for old, new in stale if old.hash != new.hash})
        if self._forgotten.refresh():  # somebody was forgotten meanwhile
            self._forgotten.enforce()
        # Copies that come later need not be looked at.
        self._added |= {state.hash for state in files.values()}
        self.seen |= {state.hash: math.inf for state in files.values() if state.complete}
        self.done.scenes += len(scenes)
        self.done.people += sum(len(found.people.scores) for found in scenes.values())
        self._commits += 1
        if self._commits % _TIDY_COMMITS == 0:
            self._people.optimize()

    def _scene(self, shot: Shot, found: Detections, every: float) -> FoundScene:
        """A scene without people of a low score or with numbers that are not finite."""
        numbers = np.column_stack([found.boxes, found.scores, found.embeddings])
        sound = np.isfinite(numbers).all(axis=1)
        self.done.unsound += int((~sound).sum())
        sound &= np.asarray(found.scores) >= self._people.info.score_threshold
        people = jax.tree.map(lambda x: np.asarray(x)[sound], found)
        about = *shot.size, shot.taken, shot.camera, shot.second, shot.hash
        scene = Scene(scene_id(shot.hash, shot.second), shot.path, *about)
        return FoundScene(scene, people, every)

    def finish(self, sources: Sequence[str]) -> None:
        """Removes files that were renamed, and those below `sources` that are gone; tidies.

        For more people than fit into memory it makes a vector index, anew when they have doubled.
        """
        people, walk = self._people, self.done.walk
        below = tuple(os.path.join(os.path.abspath(source), "") for source in sources)
        hidden = tuple(os.path.join(folder, "") for folder in walk.skipped)
        gone = {
            path
            for path in self._known.keys() - walk.files.keys()
            if self._known[path].hash in self._added
            or (f"{path}/".startswith(below) and not path.startswith(hidden))
            if not os.path.lexists(path)
        }
        if gone and not walk.files:  # a disk that is not there
            raise UserError(f"--prune: found no photo or video, {len(gone):,} known files")
        people.remove_files(gone)
        self.done.removed = len(gone)
        people.optimize()
        count, trained = people.table.count(), people.trained()
        if not fits(count, people.info.dim) and count >= 2 * trained.get("people", 0):
            people.train()
