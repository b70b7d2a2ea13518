"""The data sets by name, and what of them the program sees: annotations, protocols, photos.

`data` is `config.data` throughout: `name`, `root`, `prepared_dir` (unset: `<root>/prepared`) and,
for `synthetic`, its shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.distributed import is_main_process
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import (
    SPLITS,
    Prepared,
    PreparedSplit,
    listed,
    read_about,
    write_about,
)
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.sources.prw import PrwSource
from data_pipeline.sources.source import Source

__all__ = [
    "DATASETS",
    "PreparedDataset",
    "PreparedSplit",
    "load_test",
    "load_train",
    "prepare",
]

# Part of what names a prepared set: raise it when the same annotations are to be prepared anew.
_FORMAT = 1
# Photos whose sizes are compared with those that were prepared.
_COMPARED = 256


class SyntheticSource(CuhkSysuSource):
    """Generated photos of colored figures (`data_pipeline.synthetic`), in CUHK-SYSU's layout."""

    title = "synthetic"
    published = None

    @property
    def default_protocols(self) -> tuple[str, ...]:
        return self.protocols


DATASETS: dict[str, type[Source]] = {
    "cuhk_sysu": CuhkSysuSource,
    "prw": PrwSource,
    "coco_person_search": CocoPersonSearchSource,
    "synthetic": SyntheticSource,
}


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """The two splits of a prepared data set."""

    train: PreparedSplit
    test: PreparedSplit


def load_train(data: ConfigDict) -> Annotations:
    """The people of the training split; reads and raises as `load_test`."""
    return _people(_opened(data), "train")


def load_test(
    data: ConfigDict, names: Sequence[str]
) -> tuple[Annotations, tuple[SearchProtocol, ...]]:
    """The people of the test split and the search protocols `names` over its images.

    Reads the prepared data set, or the annotation files below `data.root` if there is none; no
    image. Boxes are those of the published evaluation, not clipped to the photo.

    Args:
      data: `config.data`.
      names: of protocols; () takes the default ones of the data set.

    Raises:
      UserError: an unknown name, or files that are missing or not in the expected form.
    """
    opened = _opened(data)
    protocols = [opened.protocol(name) for name in names or opened.default_protocols]
    return _people(opened, "test"), tuple(protocols)


def prepare(data: ConfigDict) -> PreparedDataset:
    """Opens the prepared data set; the first time, writes it below `data.prepared_dir`.

    Process 0 prints what was found, beside the published figures where there are some. Later calls
    read nothing but the prepared set, and print a line. `data.prepare_again` replaces the set once,
    and is False then.

    Raises:
      UserError: as `load_test`; also photos that cannot be used, unless `data.skip_damaged`, and a
        folder that cannot be written.
    """
    place = _Place(data)
    again = data.prepare_again and is_main_process()
    prepared = None if again else place.find()
    if prepared is None:
        prepared = place.write(again)
    elif is_main_process():
        counts = [f"{len(getattr(prepared, split).names):,} {split}" for split in SPLITS]
        print(f"{prepared.about.title}: {' and '.join(counts)} images in {prepared.folder}")
        place.compare(prepared)
    data.prepare_again = False
    _check_damaged(prepared, data.skip_damaged)
    return PreparedDataset(*map(prepared.split, SPLITS))


class _Place:
    """Where the prepared sets of a data set are, and the original files if they are there."""

    def __init__(self, data: ConfigDict):
        self._data, self._source_class = data, DATASETS[data.name]
        root = Path(data.root).expanduser()
        self.folder = Path(data.prepared_dir or root / "prepared").expanduser() / data.name
        if data.name == "synthetic":
            _draw(data, root)
        self._has_originals = not self._source_class.missing(root)

    def source(self) -> Source:
        """A reader of the original files; UserError if they are not there."""
        return self._source_class(self._data.root)

    def find(self) -> Prepared | None:
        """The set that was made from these annotations, or the only one if these are gone.

        Files count as unchanged while their sizes and times are; else their content decides.
        """
        folders = sorted(path.parent for path in self.folder.glob("*/about.json"))
        sets = [Prepared(path, about) for path in folders if (about := read_about(path))]
        sets = [one for one in sets if one.about.orientation == self._data.orientation]
        if not self._has_originals:
            if len(sets) > 1:
                paths = listed(str(one.folder) for one in sets)
                raise UserError(
                    f"{self._data.root}: lacks the annotations that tell which of the prepared "
                    f"sets to take; move the others elsewhere:{paths}"
                )
            return sets[0] if sets else None
        files = self.source().annotation_files()
        stamp = _stamp(files)
        for one in sets:
            if one.about.stamp == stamp:
                return one
        digest = _digest(files) if sets else ""
        for one in sets:
            if one.about.digest == digest:
                one.about.stamp = stamp
                _try_to_write(one)
                return one
        return None

    def write(self, again: bool) -> Prepared:
        """Prepares the data set, unless another process does it meanwhile."""
        from data_pipeline.preparation import write_prepared

        source = self.source()
        with self._lock():
            if not again and (found := self.find()):
                return found
            for left in self.folder.glob("*.partial-*"):  # by a process that was killed
                shutil.rmtree(left)
            files = source.annotation_files()
            digest, stamp = _digest(files), _stamp(files)
            target = self.folder / f"{digest}-{self._data.orientation}"
            print(f"{source.title}: preparing {target}", flush=True)
            return write_prepared(source, target, self._data, digest=digest, stamp=stamp)

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps other processes from preparing here."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock")
            try:
                return lock.acquire(timeout=0)
            except filelock.Timeout:
                print(f"waiting for the process that prepares {self.folder}", flush=True)
                return lock.acquire()
        except OSError as error:
            raise UserError(
                f"{self.folder}: {error.strerror}; --config.data.prepared_dir names another place"
            ) from error

    def compare(self, prepared: Prepared) -> None:
        """Looks whether photos were replaced, by the sizes in bytes of some of them."""
        if not self._has_originals:
            return
        sizes, source = prepared.photo_bytes(), self.source()
        names = np.random.default_rng().permutation(list(sizes))[:_COMPARED].tolist()
        found = {name: _bytes_of(source.image_path(name)) for name in names}
        changed = sum(size not in (None, sizes[name]) for name, size in found.items())
        if changed:
            print(
                f"note: {changed} of {len(found)} photos in {source.root} are not those that were "
                "prepared; --config.data.prepare_again=True takes them"
            )


def _opened(data: ConfigDict) -> Source | Prepared:
    place = _Place(data)
    again = data.prepare_again and is_main_process()
    if again or (prepared := place.find()) is None:
        return place.source()
    _check_damaged(prepared, data.skip_damaged)
    return prepared


def _people(opened: Source | Prepared, split: str) -> Annotations:
    people: Annotations = getattr(opened, split)
    if is_main_process():
        notes = opened.notes(split) if isinstance(opened, Prepared) else opened.notes
        for note in notes:
            print(note, flush=True)
    return people


def _check_damaged(prepared: Prepared, skip: bool) -> None:
    lines = [
        f"{name}: {reason}" for x in prepared.about.damaged.values() for name, reason in x.items()
    ]
    if lines and not skip:
        raise UserError(
            f"{prepared.folder}: {len(lines):,} photos cannot be used; "
            "--config.data.skip_damaged=True goes on without them, "
            f"--config.data.prepare_again=True takes repaired ones:{listed(lines)}"
        )


def _draw(data: ConfigDict, root: Path) -> None:
    # Imported here, because nothing else needs the module that draws figures.
    from data_pipeline.synthetic import dataset as synthetic

    if not root.exists():
        print(f"synthetic: drawing the data set in {root}", flush=True)
    synthetic.write_synthetic(root, synthetic.SyntheticSpec(**data.synthetic))


def _stamp(files: Sequence[Path]) -> str:
    about = ((path.name, path.stat()) for path in files)
    found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name}/{len(content)}/".encode() + content)
    return digest.hexdigest()[:12]


def _bytes_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # the originals may be gone
        return None


def _try_to_write(prepared: Prepared) -> None:
    with contextlib.suppress(OSError):  # if not, the content is read again the next time
        write_about(prepared.folder, prepared.about)
