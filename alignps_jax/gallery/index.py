"""Finds everybody in photos and videos and stores them: `--mode=index`, `--watch`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
import watchfiles

from alignps_jax.errors import IncompleteError
from alignps_jax.gallery.entries import Scene, scene_id
from alignps_jax.gallery.forget import Forgotten
from alignps_jax.gallery.gallery import Gallery, fits
from alignps_jax.gallery.people import FileState, FoundScene, People
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import Photo, detect_all, shot_photo
from alignps_jax.log import progress
from alignps_jax.media import DEFAULT_EXCLUDES, Shot, Walk, is_video, shots
from alignps_jax.types import Detections

COMMIT_SECONDS = 5.0  # what a kill can cost
# In ms; files that are still being copied are left alone until nothing changes for a `step`.
_WATCH: Any = {"step": 2000, "debounce": 60_000, "rust_timeout": 1000, "yield_on_timeout": True}

Results = Iterator[Photo[Shot]]
Find = Callable[[Detector, Sequence[str], float, Mapping[str, float]], Results]


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
        found = f"found {self.people:,} people in {self.scenes:,} photos and frames"
        known = f"{self.known:,} of {len(self.walk.files):,} files were known"
        unsound = f"; {self.unsound:,} detections were not finite" * (self.unsound > 0)
        return f"{found}; {known}, {self.removed:,} gone{unsound}"


def find_people(
    detector: Detector, paths: Sequence[str], every: float, seen: Mapping[str, float]
) -> Results:
    """The people of files, in order; videos are sampled at intervals of `every` seconds.

    `seen`: the second of each content up to which it is known, infinity where all is.
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
    begun: Callable[[Indexed], None] = lambda done: None,
    find: Find = find_people,
) -> Indexed:
    """Finds everybody in files that a gallery does not know as they are, and adds them.

    One frame of a video is searched per `every` seconds; one that was looked at as often is known.
    `prune` removes the people of files below the sources that are gone, unless all are; `excludes`
    are patterns of what to leave out. `begun` gets what is returned, at once; `find` may work
    elsewhere, in any order of the files. UserError if a source does not exist.
    """
    detector, people = gallery.own_detector(), gallery.people
    with people.only_writer(), ThreadPoolExecutor(1, "commit") as writer:
        run = _Run(people, every, done := Indexed(Walk(sources, excludes)))
        begun(done)
        ready, begin = list[Photo[Shot]](), time.monotonic()
        under_way = writer.submit(lambda: None)
        with progress(desc="index", unit="file", total=len(run.pending)) as bar:
            for one in find(detector, run.pending, every, run.seen):
                ready.append(one)
                bar.update(one.tag.second is None)
                if time.monotonic() - begin > COMMIT_SECONDS:
                    under_way.result()  # the network works while the last batch is committed
                    under_way = writer.submit(run.commit, ready)
                    ready, begin = [], time.monotonic()
        under_way.result()
        run.commit(ready)
        run.finish(sources if prune and done.walk.files else ())  # a disk may not be there
    return done


class _Run:
    """What an indexing run knows of its gallery, and does."""

    def __init__(self, people: People, every: float, done: Indexed):
        self._people, self._every, self.done = people, every, done
        self._forgotten, self._turns = Forgotten(people), itertools.count(1)
        known, files = people.known_files().values(), done.walk.files
        # Contents with frames of a longer `every`: the last one is not where a killed run was.
        self._mixed = {state.hash for state in known if state.every > every}
        self.seen = dict.fromkeys(self._forgotten.hashes, math.inf)
        complete = set[tuple[object, ...]]()  # path, size, time of change
        for state in known:
            if state.complete and state.every <= every:
                self.seen[state.hash] = math.inf
                complete.add(state[:3])
            elif state.every == every:
                frames = people.scenes.rows(["second"], hash=[state.hash])["second"]
                self.seen.setdefault(state.hash, max(frames.to_pylist(), default=-1.0))
        self.pending = [path for path, now in files.items() if (path, *now) not in complete]
        done.known = len(files) - len(self.pending)

    def commit(self, results: Sequence[Photo[Shot]]) -> None:
        """Stores the scenes and states of files; lists those that could not be read."""
        self._forgotten.refresh()
        files, scenes = dict[str, FileState](), dict[str, FoundScene]()
        for one in results:
            shot, path, complete = one.tag, one.tag.path, one.tag.second is None
            self.done.done += complete
            if one.error is not None:
                self.done.walk.skipped[path] = str(one.error)
                continue
            every = self._every if is_video(path) else 0.0
            every = every if complete or shot.hash not in self._mixed else math.inf
            state = FileState(path, *self.done.walk.files[path], shot.hash, every, complete)
            files[path] = state
            if one.found is not None and self.seen.get(shot.hash) != math.inf:
                found = self._forgotten.without(self._scene(shot, one.found))
                if found:  # once of copies that were read together
                    scenes.setdefault(found.scene.id, found)
        self._people.commit(list(scenes.values()), list(files.values()))
        if self._forgotten.refresh():  # somebody was forgotten meanwhile
            self._forgotten.enforce()
        # Copies that come later need not be looked at.
        self.seen |= {state.hash: math.inf for state in files.values() if state.complete}
        self.done.scenes += len(scenes)
        self.done.people += sum(len(found.people.scores) for found in scenes.values())
        if next(self._turns) % 200 == 0:
            self._people.optimize()  # each commit makes small files, which many make slow

    def _scene(self, shot: Shot, found: Detections) -> FoundScene:
        """A scene without people of a low score or with numbers that are not finite."""
        numbers = np.column_stack([found.boxes, found.scores, found.embeddings])
        sound = np.isfinite(numbers).all(axis=1)
        self.done.unsound += int((~sound).sum())
        sound &= np.asarray(found.scores) >= self._people.info.score_threshold
        people = jax.tree.map(lambda x: np.asarray(x)[sound], found)
        about = *shot.size, shot.taken, shot.camera, shot.second, shot.hash
        scene = Scene(scene_id(shot.hash, shot.second), shot.path, *about)
        return FoundScene(scene, people)

    def finish(self, sources: Sequence[str]) -> None:
        """Removes files that were renamed, and those below `sources` that are gone; tidies.

        For more people than fit into memory it makes a vector index, anew when they have doubled.
        """
        people, walk, known = self._people, self.done.walk, self._people.known_files()
        added = {known[path].hash for path in self.pending if path in known}
        below = tuple(os.path.join(os.path.abspath(source), "") for source in sources)
        hidden = tuple(os.path.join(folder, "") for folder in walk.skipped)
        gone = {
            path
            for path in known.keys() - walk.files.keys()
            if known[path].hash in added
            or (f"{path}/".startswith(below) and not path.startswith(hidden))
            if not os.path.lexists(path)
        }
        people.files.delete("path", gone)
        people.remove_strays()
        self.done.removed = len(gone)
        people.optimize()
        count, trained = people.table.count(), people.trained()
        if not fits(count, people.info.dim) and count >= 2 * trained.get("people", 0):
            people.train()


def watch(
    run: Callable[[], object], sources: Sequence[str], stop: threading.Event | None = None
) -> None:
    """Runs `run` now, and after each change below the sources; prints an IncompleteError of it."""
    # The first turn comes without a change: it is watched before it is looked at.
    for turn, changes in enumerate(watchfiles.watch(*sources, **_WATCH, stop_event=stop)):
        if changes or turn == 0:
            try:
                run()
            except IncompleteError as error:
                print(f"note: {error}")
