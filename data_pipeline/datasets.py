"""The data sets by name, and what of them the program sees: annotations, protocols, photos.

`data` is `config.data` throughout: `name`, `root`, `prepared_dir` (unset: `<root>/prepared`) and,
for `synthetic`, its shape.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import filelock
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.distributed import is_main_process
from alignps_jax.errors import UserError, known_name
from alignps_jax.types import Annotations, SearchProtocol
from data_pipeline.prepared import Prepared, listed, prepared_sets, write_about
from data_pipeline.sources.coco_person_search import CocoPersonSearchSource
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.sources.prw import PrwSource
from data_pipeline.sources.source import Source

# Photos whose sizes are compared with those that were prepared.
_COMPARED = 256


class SyntheticSource(CuhkSysuSource):
    """Generated photos of colored figures (`data_pipeline.synthetic`), in CUHK-SYSU's layout."""

    published = ()
    default_protocols = Source.default_protocols


DATASETS: dict[str, type[Source]] = {
    "cuhk_sysu": CuhkSysuSource,
    "prw": PrwSource,
    "coco_person_search": CocoPersonSearchSource,
    "synthetic": SyntheticSource,
}


def load_train(data: ConfigDict) -> Annotations:
    """The people of the training split; reads and raises as `load_test`."""
    return _people(_find(data) or DATASETS[data.name](data.root), "train")


def load_test(
    data: ConfigDict, names: Sequence[str]
) -> tuple[Annotations, tuple[SearchProtocol, ...]]:
    """The people of the test split, and the search protocols `names` (or the default ones).

    Reads the prepared data set, or the annotation files below `data.root` if there is none. Boxes
    are those of the published evaluation, not clipped to the photo.

    Raises:
      UserError: an unknown name, or files that are missing or not in the expected form.
    """
    opened = _find(data) or DATASETS[data.name](data.root)
    protocols = [
        opened.protocol(known_name("config.eval.protocols", name, opened.protocols))
        for name in names or opened.default_protocols
    ]
    return _people(opened, "test"), tuple(protocols)


def prepare(data: ConfigDict) -> Prepared:
    """Opens the prepared data set; the first time, writes it below `data.prepared_dir`.

    Prints what was found, beside the published figures where there are some; later calls read the
    prepared set alone and print a line. `data.prepare_again` replaces it once, and is False then.

    Raises:
      UserError: as `load_test`; also photos that cannot be used, unless `data.skip_damaged`.
    """
    prepared = _find(data)
    if prepared is None:
        prepared = _prepare(data)
    elif is_main_process():
        train, test = (len(x.names) for x in (prepared.train, prepared.test))
        print(f"{data.name}: {train:,} train and {test:,} test images in {prepared.folder}")
        _compare_photos(data, prepared)
    data.prepare_again = False
    _check_damaged(data, prepared)
    return prepared


def _people(opened: Source | Prepared, split: str) -> Annotations:
    people: Annotations = getattr(opened, split)
    notes = opened.about.notes[split] if isinstance(opened, Prepared) else opened.notes
    for note in notes if is_main_process() else ():
        print(note, flush=True)
    return people


def _check_damaged(data: ConfigDict, prepared: Prepared) -> None:
    damaged = [photo for split in prepared.about.damaged.values() for photo in split.items()]
    found = f"{prepared.folder}: {len(damaged):,} photos cannot be used"
    if damaged and not data.skip_damaged:
        raise UserError(
            f"{found}; --config.data.skip_damaged=True goes on without them, "
            "--config.data.prepare_again=True looks at them again:"
            + listed(f"{name}: {reason}" for name, reason in damaged)
        )
    if damaged and is_main_process():
        print(f"{found}: they are not trained on, and black in evaluations")


def _originals(data: ConfigDict) -> Source | None:
    """A reader of the original files, if they are there."""
    source = DATASETS[data.name]
    return None if source.missing(Path(data.root).expanduser()) else source(data.root)


def _folder(data: ConfigDict) -> Path:
    """The folder of all prepared sets of a data set."""
    return Path(data.prepared_dir or Path(data.root) / "prepared").expanduser() / data.name


def _find(data: ConfigDict) -> Prepared | None:
    """The set that was made from these annotations, or the only one if these are gone.

    Annotations are unchanged while sizes and times of their files are; else their content decides.
    """
    if data.name == "synthetic":
        # Imported here, because nothing else needs the module that draws figures.
        from data_pipeline.synthetic.dataset import SyntheticSpec, write_synthetic

        write_synthetic(Path(data.root).expanduser(), SyntheticSpec(**data.synthetic))
    if data.prepare_again and is_main_process():
        return None
    sets = [x for x in prepared_sets(_folder(data)) if x.about.orientation == data.orientation]
    if not sets or (source := _originals(data)) is None:
        if len(sets) > 1:
            raise UserError(
                f"{data.root}: lacks the annotations that tell which prepared set to take; "
                f"expected one of these alone:{listed(str(one.folder) for one in sets)}"
            )
        return sets[0] if sets else None
    stamp = _stamp(source)
    if same := [one for one in sets if one.about.stamp == stamp]:
        return same[0]
    digest = _digest(source)
    for one in sets:
        if one.about.digest == digest:
            one.about.stamp = stamp
            with contextlib.suppress(OSError):  # if not, the content decides again
                write_about(one.folder, one.about)
            return one
    return None


def _prepare(data: ConfigDict) -> Prepared:
    """Writes the prepared set, unless another process did meanwhile."""
    from data_pipeline.preparation import write_prepared

    source, folder = DATASETS[data.name](data.root), _folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{data.name}: preparing {folder}, or waiting for the process that does", flush=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(folder / ".lock"))
        except OSError as error:  # some network file systems have no locks
            print(f"note: {folder}: {error.strerror}; one process alone should prepare it")
        if found := _find(data):
            return found
        for left in folder.glob("*.partial-*"):  # by a process that was killed
            shutil.rmtree(left)
        digest, stamp = _digest(source), _stamp(source)
        return write_prepared(source, folder / f"{digest}-{data.orientation}", data, digest, stamp)


def _compare_photos(data: ConfigDict, prepared: Prepared) -> None:
    """Looks whether photos were replaced, by the sizes in bytes of some of them."""
    if (source := _originals(data)) is None:
        return
    train, test = prepared.train, prepared.test
    names, sizes = np.array(train.names + test.names), np.concatenate([train.bytes, test.bytes])
    sample = np.random.default_rng().permutation(np.flatnonzero(sizes >= 0))[:_COMPARED]
    changed = 0
    for name, size in zip(names[sample].tolist(), sizes[sample].tolist(), strict=True):
        with contextlib.suppress(OSError):  # the photos may be gone
            changed += source.image_path(name).stat().st_size != size
    if changed:
        print(
            f"note: {changed} of {len(sample)} photos in {source.root} are not those that were "
            "prepared; --config.data.prepare_again=True takes them"
        )


def _stamp(source: Source) -> str:
    about = [(name, os.stat(source.root / name)) for name in source.annotation_files()]
    found = [(name, file.st_size, file.st_mtime_ns) for name, file in about]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _digest(source: Source) -> str:
    digest = hashlib.sha256()
    for name in source.annotation_files():
        content = (source.root / name).read_bytes()
        digest.update(f"{name}/{len(content)}/".encode() + content)
    return digest.hexdigest()[:12]
