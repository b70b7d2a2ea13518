"""A gallery as one file that other vector databases read: `--mode=export --gallery`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignps_jax.files import check_outputs, complete_file
from alignps_jax.gallery.database import reading
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import IS_PERSON, PERSON_COLUMNS
from alignps_jax.types import UserError

COLUMNS = (*PERSON_COLUMNS, "embedding")
SUFFIXES = (".parquet", ".arrow")


def export_people(gallery: Gallery, target: Path) -> int:
    """Writes everybody, a row per person, with the embedding and what is known of the scene.

    Columns: `id`, `scene`, `path`, `height`, `width`, `taken`, `camera`, `second`, `box`
    (x1, y1, x2, y2 in pixels of the scene), `score`, `embedding` (of length one). Needs memory for
    a few thousand people only.

    Args:
      gallery: what to write.
      target: a .parquet or .arrow file (Arrow's file format, also known as Feather 2).

    Returns:
      The number of people.

    Raises:
      UserError: the suffix is another one, or the file cannot be written.
    """
    check_target(target)
    fields = [gallery.table.schema.field(name) for name in COLUMNS]
    columns = pa.schema([field.remove_metadata() for field in fields])
    count = 0
    with complete_file(target) as temporary, _writer(target, temporary, columns) as writer:
        for batch in _batches(gallery):
            arrays = batch.select(COLUMNS).columns
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=columns))
            count += len(batch)
    return count


def _batches(gallery: Gallery) -> Iterator[pa.RecordBatch]:
    with reading(gallery.address):
        gallery.table.checkout_latest()
        yield from gallery.table.search().where(IS_PERSON).select(list(COLUMNS)).to_batches()


def export_gallery(gallery: Gallery, target: Path) -> None:
    """`export_people`, and says what was written."""
    check_target(target)
    check_outputs(target)
    print(f"{export_people(gallery, target):,} people  {target}")


def check_target(target: Path) -> None:
    """Raises UserError unless it is a file that `export_people` writes."""
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--target: found {target}, expected a file {' or '.join(SUFFIXES)} for a gallery"
        )


@contextlib.contextmanager
def _writer(target: Path, temporary: Path, columns: pa.Schema) -> Iterator[Any]:
    if target.suffix.lower() == ".parquet":
        with pq.ParquetWriter(temporary, columns) as writer:
            yield writer
    else:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, columns) as writer:
            yield writer
