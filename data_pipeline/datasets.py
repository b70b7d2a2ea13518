"""The data sets by name, their search protocols, and their preparation.

`data` is `config.data` throughout: `name`, `root`, `prepared_dir` (unset: `<root>/prepared`) and,
for `synthetic`, its shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.leftovers import clear_leftovers
from data_pipeline.prepared import SPLITS, PersonSearchBuilder, PreparedSplit
from data_pipeline.sources.coco_person_search import CocoPersonSearch
from data_pipeline.sources.cuhk_sysu import CuhkSysu, CuhkSysuSource
from data_pipeline.sources.prw import Prw
from data_pipeline.sources.source import Counts, Source

__all__ = [
    "DATASETS",
    "PreparedDataset",
    "PreparedSplit",
    "load_test",
    "load_train",
    "prepare",
]


class SyntheticSource(CuhkSysuSource):
    """The generated data set, in CUHK-SYSU's layout."""

    title = "synthetic"
    published = None

    @property
    def default_protocols(self) -> tuple[str, ...]:
        return self.protocols


class Synthetic(CuhkSysu):
    """Generated photos of colored figures, made by `data_pipeline.synthetic`."""

    source_class = SyntheticSource


DATASETS: dict[str, type[PersonSearchBuilder]] = {
    "cuhk_sysu": CuhkSysu,
    "prw": Prw,
    "coco_person_search": CocoPersonSearch,
    "synthetic": Synthetic,
}


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """The two splits of a prepared data set."""

    train: PreparedSplit
    test: PreparedSplit


def load_train(data: ConfigDict) -> Annotations:
    """The people of the training split; reads and raises as `load_test`."""
    source = _builder_class(data).source_class(data.root)
    people = source.train
    _print_notes(source)
    return people


def load_test(
    data: ConfigDict, names: Sequence[str]
) -> tuple[Annotations, tuple[SearchProtocol, ...]]:
    """The people of the test split and the search protocols `names` over its images.

    Reads the annotation files below `data.root`, no image; boxes are those of the published
    evaluation, not clipped to the photo.

    Args:
      data: `config.data`.
      names: of protocols; () takes the default ones of the data set.

    Raises:
      UserError: an unknown name, or files that are missing or not in the expected form.
    """
    source = _builder_class(data).source_class(data.root)
    protocols = [source.protocol(name) for name in names or source.default_protocols]
    people = source.test
    _print_notes(source)
    return people, tuple(protocols)


def _print_notes(source: Source) -> None:
    if jax.process_index() == 0:
        for note in source.notes:
            print(note, flush=True)


def prepare(data: ConfigDict) -> PreparedDataset:
    """Opens the prepared data set; the first time, writes it below `data.prepared_dir`.

    Prints what was found, beside the published figures where there are some; a later call, with
    the same annotations and photos, prints one line. Photos count as the same while their names,
    sizes in bytes and times of the last change are.

    Raises:
      UserError: as `load_test`; also an image that is missing or damaged, and a folder that cannot
        be written.
    """
    builder_class = _builder_class(data)
    prepared = Path(data.prepared_dir or Path(data.root) / "prepared").expanduser()
    make = partial(builder_class, root=data.root, data_dir=prepared, max_pixels=data.max_pixels)
    builder = make()
    for line in clear_leftovers(builder.folder):
        print(f"  {line}")
    if builder.is_prepared:
        counts = [f"{len(builder.annotations[split].names):,} {split}" for split in SPLITS]
        print(f"{builder.source.title}: {' and '.join(counts)} images in {builder.data_path}")
    else:
        print(f"{builder.source.title}: preparing {builder.data_path}", flush=True)
        for folder in builder.outdated:
            print(f"  {folder}: made from other annotations or photos; stays until you delete it")
        if builder.prepare():
            print(_summary(builder), flush=True)
        else:
            builder = make()
            print("  another process prepared it meanwhile", flush=True)
    return PreparedDataset(**{split: builder.open(split) for split in SPLITS})


def _builder_class(data: ConfigDict) -> type[PersonSearchBuilder]:
    builder_class = DATASETS[data.name]
    if data.name == "synthetic":
        # Imported here, because nothing else needs the module that draws figures.
        from data_pipeline.synthetic import dataset as synthetic

        root = Path(data.root).expanduser()
        try:
            synthetic.write_synthetic(root, synthetic.SyntheticSpec(**data.synthetic))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"config.data.root: {root} cannot be written ({reason})") from error
    return builder_class


def _summary(builder: PersonSearchBuilder) -> str:
    """What was found, beside what is published."""
    source = builder.source
    protocol = source.default_protocols[0]
    found = Counts(
        train_images=len(source.train.names),
        train_identities=_num_labeled_identities(source.train),
        test_images=len(source.test.names),
        queries=len(source.protocol(protocol).query_image),
    )
    labels = {
        "train_images": "training images",
        "train_identities": "training identities",
        "test_images": "test images",
        "queries": f"queries ({protocol})",
    }
    known = source.published
    lines = [f"  {'':20}{'found':>10}" + ("" if known is None else f"{'published':>12}")]
    different = []
    for field, label in labels.items():
        count = getattr(found, field)
        line = f"  {label:20}{count:>10,}"
        if known is not None:
            line += f"{getattr(known, field):>12,}"
            different += [label] if count != getattr(known, field) else []
        lines.append(line)
    if different:
        remark = f" ({source.remark})" if source.remark else ""
        lines.append(f"  warning: differs from what is published: {', '.join(different)}{remark}")
    lines.append(
        f"  clipped {builder.clipped:,} boxes to their photo, dropped {builder.dropped:,} outside"
    )
    return "\n".join(lines)


def _num_labeled_identities(annotations: Annotations) -> int:
    pairs = zip(annotations.identity, annotations.labeled, strict=True)
    return len(np.unique(np.concatenate([ids[mask] for ids, mask in pairs])))
